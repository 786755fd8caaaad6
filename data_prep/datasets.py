"""Where pixels come from: one function for each data set, listed in DATASETS."""

import hashlib
import http.client
import os
import socket
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_train.data_prep.files import DataError, NoNetworkError, locked

# Seconds without a sign of life from the download server before giving up.
NETWORK_PATIENCE = 15.0

CIFAR10_FOLDER = "cifar-10-batches-py"
# as the data set's page has them, and torchvision, whose import takes too long to ask for them
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"


@dataclass(frozen=True)
class Pixels:
    """A data set in memory.

    splits maps "train" and "test" to (images uint8 (N, H, W, 3), labels int64 (N,)) in the data set's own
    order; classes[label] is the name of a label.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]


def load(dataset: str, source: Path | None) -> Pixels:
    """Load a data set by its name in DATASETS; source is the folder with its official files, if it has any.

    Raises DataError for an unknown name, a wrong source or damaged files, NoNetworkError if a download fails.
    """
    if dataset not in DATASETS:
        raise DataError(f"data set {dataset!r} is unknown: choose one of {', '.join(DATASETS)}")
    return DATASETS[dataset](source)


def _cifar10(source: Path | None) -> Pixels:
    setting = "--source"
    if source is None and os.environ.get("CIFAR10_DIR"):
        setting, source = "CIFAR10_DIR", Path(os.environ["CIFAR10_DIR"])
    if source is not None and source.name == CIFAR10_FOLDER and not (source / CIFAR10_FOLDER).is_dir():
        source = source.parent
    if source is not None and not (source / CIFAR10_FOLDER).is_dir():
        raise DataError(
            f"{setting} {source} holds no folder {CIFAR10_FOLDER}: "
            f"give the folder that contains {CIFAR10_FOLDER}, leave {setting} out to download CIFAR-10, or give images "
            f"of your own another name with --dataset"
        )
    root = source if source is not None else _download_cifar10()
    # torchvision takes seconds to import, so only once the source looks right.
    from torchvision.datasets import CIFAR10
    from tqdm import tqdm

    splits = {}
    for split in tqdm(("train", "test"), desc="read cifar10", unit="split", disable=None):
        try:
            part = CIFAR10(str(root), train=split == "train")
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{root / CIFAR10_FOLDER / (_not_official(root) or [''])[0]} is missing or not the official file: "
                f"unpack cifar-10-python.tar.gz again into {root}"
            ) from error
        splits[split] = (np.ascontiguousarray(part.data), np.asarray(part.targets, dtype=np.int64))
    return Pixels(tuple(part.classes), splits)


def _not_official(root: Path) -> list[str]:
    """Names of CIFAR-10's files that are missing or altered."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    return [name for name, md5 in files if not check_integrity(str(root / CIFAR10_FOLDER / name), md5)]


def _download_cifar10() -> Path:
    """The cache folder that contains cifar-10-batches-py, filled if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_train" / "cifar10"
    patience = socket.getdefaulttimeout()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):
            # urllib waits for ever on a silent server unless told otherwise.
            socket.setdefaulttimeout(NETWORK_PATIENCE)
            if not (cache / CIFAR10_FOLDER).is_dir() or _not_official(cache):
                archive = cache / CIFAR10_URL.rpartition("/")[2]
                if not _is_official(archive):
                    _fetch(CIFAR10_URL, archive)
                    if not _is_official(archive):
                        raise RuntimeError("what came is not the official file")
                with tarfile.open(archive) as files:
                    # some versions of Python 3.10 have none
                    files.extraction_filter = getattr(tarfile, "data_filter", None)
                    files.extractall(cache)
    # A RuntimeError is a download with a wrong checksum: cut short, or a login page.
    except (
        urllib.error.URLError,
        TimeoutError,
        ConnectionError,
        http.client.HTTPException,
        RuntimeError,
    ) as error:
        raise NoNetworkError(
            f"CIFAR-10 could not be downloaded from {CIFAR10_URL} ({getattr(error, 'reason', error)}): "
            f"set CIFAR10_DIR to the folder that contains {CIFAR10_FOLDER}, "
            "or use the small stand-in with --dataset digits"
        ) from error
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be written ({error.strerror or error}): "
            "set XDG_CACHE_HOME to a folder that can be, or CIFAR10_DIR to where CIFAR-10 already is"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return cache


def _is_official(archive: Path) -> bool:
    return archive.exists() and hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() == CIFAR10_MD5


def _fetch(url: str, path: Path) -> None:
    """Download a file: with a progress bar on a terminal, and elsewhere one line."""
    from tqdm import tqdm

    with urllib.request.urlopen(url) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        said = f"data_prep: downloading {url} ({size / 1e6:,.0f} MB) into {path.parent}"
        if not sys.stderr.isatty():
            print(said, file=sys.stderr, flush=True)
        bar = tqdm(desc=f"download {path.name}", total=size or None, unit="B", unit_scale=True, disable=None)
        with bar, path.open("wb") as file:
            while part := answer.read(1 << 16):
                file.write(part)
                bar.update(len(part))


def _digits(source: Path | None) -> Pixels:
    if source is not None:
        raise DataError(f"--source {source} is not for --dataset digits, which scikit-learn brings: leave it out")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    gray = bunch.images.astype(np.int64)  # (1797, 8, 8), 0..16
    labels = bunch.target.astype(np.int64)

    # Bilinear scaling to 32x32 as a matrix of whole eighths: integers give the same pixels on every machine.
    centres = np.clip((2 * np.arange(32) + 1) - 4, 0, 56)  # of the new pixels, in eighths of an old pixel
    left = np.minimum(centres // 8, 6)
    weights = np.zeros((32, 8), np.int64)
    weights[np.arange(32), left + 1] = centres - 8 * left
    weights[np.arange(32), left] = 8 - (centres - 8 * left)
    large = (weights @ gray @ weights.T * 255 + 512) // 1024  # 16 levels x 8 x 8 = 1024 is white
    images = np.repeat(large.astype(np.uint8)[..., None], 3, axis=-1)

    # Every fifth image of each class is a test image: stratified, and free of any random generator.
    in_test = np.zeros(len(labels), bool)
    in_test[np.argsort(labels, kind="stable")[::5]] = True
    return Pixels(
        tuple(f"digit {i}" for i in range(10)),
        {"train": (images[~in_test], labels[~in_test]), "test": (images[in_test], labels[in_test])},
    )


# To add a data set, write a function like those above and name it here. A folder of images needs none: see images.py.
DATASETS: dict[str, Callable[[Path | None], Pixels]] = {"cifar10": _cifar10, "digits": _digits}
