"""The built-in data sets: one function loads each, listed in DATASETS."""

import contextlib
import http.client
import io
import os
import socket
import sys
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_train.data_prep.files import DataError, NoNetworkError, locked
from dist_train.data_prep.folders import Skipped
from dist_train.errors import say

NETWORK_TIMEOUT = 15.0  # seconds without data from the download server after which the download fails

CIFAR10_FOLDER = "cifar-10-batches-py"


@dataclass(frozen=True)
class Pixels:
    """A data set in memory.

    splits maps "train" and "test" to (images uint8 (N, H, W, 3), labels int64 (N,)) in the data set's own
    order; classes[label] is the name of a label. grey_bits: of the grey values in pictures of 16 bits, as in
    `pictures.read_picture`; None where there are none. skipped: what is in no split.
    names: of the images of each split, in their order; empty where they have none.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]
    grey_bits: int | None = None
    skipped: tuple[Skipped, ...] = ()
    names: dict[str, list[str]] = field(default_factory=dict)


def load(dataset: str, source: Path | None) -> Pixels:
    """Load a data set by its name in DATASETS. source: the folder with its official files, None to download them.

    Raises DataError for an unknown name, a wrong source or damaged files, NoNetworkError if a download fails.
    """
    if dataset not in DATASETS:
        raise DataError(f"data set {dataset!r} is unknown: choose one of {', '.join(DATASETS)}")
    return DATASETS[dataset](source)


def _cifar10(source: Path | None) -> Pixels:
    """CIFAR-10 (Krizhevsky 2009, "Learning multiple layers of features from tiny images"), read by torchvision."""
    setting = "--source"
    if source is None and os.environ.get("CIFAR10_DIR"):
        setting, source = "CIFAR10_DIR", Path(os.environ["CIFAR10_DIR"])
    if source is not None and source.name == CIFAR10_FOLDER and not (source / CIFAR10_FOLDER).is_dir():
        source = source.parent
    if source is not None and not (source / CIFAR10_FOLDER).is_dir():
        raise DataError(
            f"{setting} {source} holds no folder {CIFAR10_FOLDER}: "
            f"give the folder that contains {CIFAR10_FOLDER}, remove {setting} to download CIFAR-10, or give images of "
            f"your own another name with --dataset"
        )
    # imported only after the check of the source, since torchvision takes seconds
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity
    from tqdm import tqdm

    root = source if source is not None else _download_cifar10()
    official = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    splits = {}
    for split in tqdm(("train", "test"), desc="read cifar10", unit="split", disable=None):
        try:
            part = CIFAR10(str(root), train=split == "train")
        except (RuntimeError, OSError) as error:
            damaged = [n for n, md5 in official if not check_integrity(str(root / CIFAR10_FOLDER / n), md5)]
            raise DataError(
                f"{root / CIFAR10_FOLDER / (damaged or [''])[0]} is missing or not the official file: "
                f"unpack cifar-10-python.tar.gz again into {root}"
            ) from error
        splits[split] = (np.ascontiguousarray(part.data), np.asarray(part.targets, dtype=np.int64))
    return Pixels(tuple(part.classes), splits)


def _download_cifar10() -> Path:
    """The cache folder that contains cifar-10-batches-py, downloaded by torchvision if it is missing."""
    from torchvision.datasets import CIFAR10

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_train" / "cifar10"
    default_timeout = socket.getdefaulttimeout()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):
            # without a timeout urllib waits forever for a server that sends nothing
            socket.setdefaulttimeout(NETWORK_TIMEOUT)
            # torchvision would draw its progress bar into log files, too
            quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
            if not (cache / CIFAR10_FOLDER).is_dir():
                say(f"downloading CIFAR-10 into {cache}", "data_prep")
            with quiet:
                CIFAR10(str(cache), download=True)
    # torchvision raises RuntimeError for a wrong checksum: a truncated download, or a login page
    except (
        urllib.error.URLError,
        TimeoutError,
        ConnectionError,
        http.client.HTTPException,
        RuntimeError,
    ) as error:
        raise NoNetworkError(
            f"CIFAR-10 could not be downloaded from {CIFAR10.url} ({getattr(error, 'reason', error)}): "
            f"set CIFAR10_DIR to the folder that contains {CIFAR10_FOLDER}, "
            "or use the small data set digits with --dataset digits"
        ) from error
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be written ({error.strerror or error}): "
            "set XDG_CACHE_HOME to a writable folder, or CIFAR10_DIR to a folder with CIFAR-10"
        ) from error
    finally:
        socket.setdefaulttimeout(default_timeout)
    return cache


def _digits(source: Path | None) -> Pixels:
    """scikit-learn's handwritten digits, scaled from 8x8 grey to 32x32 RGB."""
    if source is not None:
        raise DataError(f"--source {source} is not for --dataset digits, which scikit-learn includes: remove it")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    gray = bunch.images.astype(np.int64)  # (1797, 8, 8), 0..16
    labels = bunch.target.astype(np.int64)

    # bilinear scaling to 32x32 with weights in eighths: integer arithmetic gives the same pixels on every machine
    centres = np.clip((2 * np.arange(32) + 1) - 4, 0, 56)  # of the new pixels, in eighths of an old pixel
    left = np.minimum(centres // 8, 6)
    weights = np.zeros((32, 8), np.int64)
    weights[np.arange(32), left + 1] = centres - 8 * left
    weights[np.arange(32), left] = 8 - (centres - 8 * left)
    large = (weights @ gray @ weights.T * 255 + 512) // 1024  # 16 levels x 8 x 8 = 1024 is white
    images = np.repeat(large.astype(np.uint8)[..., None], 3, axis=-1)

    # every fifth image of each class is a test image: stratified, without a random generator
    in_test = np.zeros(len(labels), bool)
    in_test[np.argsort(labels, kind="stable")[::5]] = True
    return Pixels(
        tuple(f"digit {i}" for i in range(10)),
        {"train": (images[~in_test], labels[~in_test]), "test": (images[in_test], labels[in_test])},
    )


# A new data set takes a function that returns Pixels, listed in this dict; a folder of images takes none (images.py).
DATASETS: dict[str, Callable[[Path | None], Pixels]] = {"cifar10": _cifar10, "digits": _digits}
