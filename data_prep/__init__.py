"""Write CIFAR-10 (or scikit-learn's digits) into FFCV beton files once, and check and read them afterwards.

Importing this package is cheap: torch, ffcv, torchvision and scikit-learn are imported by the functions
that need them. `python -m data_prep --help` shows the command.
"""

from data_prep.betons import (
    Manifest,
    Split,
    check,
    check_tables,
    keeping_torch_threads,
    prepare,
    read_split,
    verify,
)
from data_prep.files import DataError, NoNetworkError

__all__ = [
    "DataError",
    "Manifest",
    "NoNetworkError",
    "Split",
    "check",
    "check_tables",
    "keeping_torch_threads",
    "prepare",
    "read_split",
    "verify",
]
