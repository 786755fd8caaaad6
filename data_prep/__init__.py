"""Writes CIFAR-10, scikit-learn's digits or a folder of images into beton files (ffcv's format), and checks and reads
these files.

Importing this package is fast: torch, ffcv, torchvision and scikit-learn are imported by the functions
that need them. `python -m dist_train.data_prep --help` shows the command.
"""

from dist_train.data_prep.beton_file import BetonFile
from dist_train.data_prep.betons import (
    MANIFEST,
    Manifest,
    Split,
    check,
    command,
    may_share_images,
    open_split,
    prepare,
    read_manifest,
    read_split,
    same_source,
    verify,
)
from dist_train.data_prep.datasets import DATASETS
from dist_train.data_prep.files import DataError, NoNetworkError
from dist_train.data_prep.images import load_labelled

__all__ = [
    "DATASETS",
    "MANIFEST",
    "BetonFile",
    "DataError",
    "Manifest",
    "NoNetworkError",
    "Split",
    "check",
    "command",
    "load_labelled",
    "may_share_images",
    "open_split",
    "prepare",
    "read_manifest",
    "read_split",
    "same_source",
    "verify",
]
