"""Which files of a folder are images of which class and split, and which are skipped."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_train.command_line import is_text
from dist_train.data_prep.files import DataError
from dist_train.data_prep.pictures import SUFFIXES

TEST_FRACTION = 0.2  # of each class, where the folder has no test split

# names of folders that hold a split, in lower case and without the words in _FILLING
_SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "val"),
}
_FILLING = r"(?:set|sets|data|dataset|images?|imgs?|pictures?|photos?|pics?|splits?|folder|dir|files?|samples?)"
_NAMED = 100  # paths that are kept of each kind of what is skipped

# why something is skipped
HIDDEN = "their names are those of hidden files"
NO_IMAGES = "their names are not those of images"
NO_CLASS = "they are in no folder of a class"
LINKS = "they are links into folders that are read anyway"
BESIDE = "they are beside the folders of the splits"
UNLABELLED = "they are in a test split without folders of the classes"
VALIDATION = "they are a validation split beside a test split, for dist-train evaluate --data"

Files = dict[str, list[Path]]  # the files of each class, by its name


@dataclass(frozen=True)
class Skipped:
    """Files and folders of a source that are in no split. reason: in words. count: how many there are. paths: the
    first ones, relative to the source."""

    reason: str
    count: int
    paths: tuple[str, ...]

    def __str__(self) -> str:
        """For a message."""
        more = f" and {self.count - 3:,} more" if self.count > 3 else ""
        return f"{self.count:,}, since {self.reason}: {', '.join(self.paths[:3])}{more}"


@dataclass(frozen=True)
class Found:
    """What a folder holds. splits: the files of `train` and of `test`; every class of `test` is one of `train`."""

    splits: dict[str, Files]
    skipped: tuple[Skipped, ...]


def scan(source: Path, test_fraction: float | None = None) -> Found:
    """The images in the folder `source`: in a folder for each class, or in two such folders for training and testing.

    The splits' folders have any of the usual names (train, Training, train_set, seg_train; test, val, ...). Of a folder
    without a split for testing, a share of each class becomes it: test_fraction, TEST_FRACTION unless given; its images
    are those with the lowest `sort_key`. Links to folders are followed. Raises DataError.
    """
    with _readable(source):
        if not source.is_dir():
            raise DataError(f"--source {source} is not a folder: give one with a folder of images for each class")
        return _Scan(source).found(test_fraction)


def labelled(source: Path, split: str) -> tuple[Files, tuple[Skipped, ...]]:
    """The images of each class in the folder `source`, or where it has folders for splits in that of `split` (`train`
    or `test`), and what was skipped of it. Raises DataError."""
    with _readable(source):
        scan = _Scan(source)
        parts = scan.parts()
        folder = source if parts["train"] == source else parts.get(split)
        if folder is None:
            raise DataError(f"{source} has no folder for the split {split}: name the folder that holds its classes")
        return scan.classes(folder), scan.skipped()


def images_below(folder: Path) -> tuple[list[Path], tuple[Skipped, ...]]:
    """All images in a folder and its subfolders, sorted by path, and what else is in them. Raises DataError."""
    with _readable(folder):
        scan = _Scan(folder)
        return scan.below(folder), scan.skipped()


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """A context in which a folder that cannot be read raises DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or source} cannot be read ({error.strerror}): change its permissions, or remove it from "
            f"{source}"
        ) from error


def sort_key(path: Path, source: Path) -> bytes:
    """The key that orders images: the SHA-256 of the path in `source`."""
    return hashlib.sha256(os.fsencode(path.relative_to(source).as_posix())).digest()


def few(names: list[str]) -> str:
    """The first three names, and the number of the others."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def split_of(name: str) -> tuple[str, str] | None:
    """The split that a folder of this name holds, `train`, `test` or `val`, and what the name says besides; None for
    any other name."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    bare = [re.sub(rf"{_FILLING}$", "", word) or word for word in words if not re.fullmatch(_FILLING, word)]
    splits = [_SPLITS[word] for word in bare if word in _SPLITS]
    rest = [word for word in bare if word not in _SPLITS]
    return (splits[0], " ".join(rest)) if len(splits) == 1 else None


class _Scan:
    """One reading of the folder `source`. The methods raise DataError, and OSError for a folder that cannot be read."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._skipped: dict[str, dict[Path, None]] = {}  # by the reason, each path once
        self._listed: dict[Path, tuple[list[Path], list[Path]]] = {}
        self._read = [source.resolve()]  # the folders that are read, where links lead to them

    def found(self, test_fraction: float | None) -> Found:
        parts = self.parts()
        if "test" in parts and test_fraction is not None:
            raise DataError(
                f"--test-fraction {test_fraction} is not for {self._source}, which has its own test split: remove it"
            )
        train = self.classes(parts["train"])
        if len(train) < 2:
            raise DataError(self._too_few(parts["train"], [*train]))
        if "test" in parts:
            test = self.classes(parts["test"])
            if unknown := [name for name in test if name not in train]:
                raise DataError(
                    f"{parts['test']} has classes that {parts['train']} does not have, {few(unknown)}: put images of "
                    f"the same classes into both"
                )
            splits = {"train": train, "test": test}
        else:
            splits = self._divided(train, test_fraction or TEST_FRACTION)
        return Found(splits, self.skipped())

    def skipped(self) -> tuple[Skipped, ...]:
        """What was skipped so far."""
        relative = {
            reason: [path.relative_to(self._source).as_posix() for path in paths]
            for reason, paths in self._skipped.items()
        }
        return tuple(Skipped(why, len(names), tuple(names[:_NAMED])) for why, names in relative.items())

    def below(self, folder: Path) -> list[Path]:
        """The images below a folder, sorted by path."""
        folders, files = self._list(folder)
        for path in files:
            if path.suffix.lower() not in SUFFIXES:
                self._skip(NO_IMAGES, path)
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        return sorted([*images, *(path for inner in folders for path in self.below(inner))])

    def parts(self) -> dict[str, Path]:
        """The folders that hold the classes of the splits `train` and `test`; without `test` where a share of `train`
        is to become it. All else in the source is skipped."""
        folders, files = self._list(self._source)
        named: dict[str, dict[str, list[Path]]] = {}  # by what their names say besides the split
        for folder in folders:
            if known := split_of(folder.name):
                named.setdefault(known[1], {}).setdefault(known[0], []).append(folder)
        pairs = [by_split for by_split in named.values() if "train" in by_split and len(by_split) > 1]
        alone = next(iter(named.get("", {}).get("train", [])), None)
        if not pairs and alone and len(self._list(alone)[0]) > 1 and not self._images(alone):
            if len(folders) > 1:
                others = few([folder.name for folder in folders if folder != alone])
                raise DataError(
                    f"{self._source} holds {alone.name}, a folder of folders, beside {others}: give --source {alone} "
                    f"if these are its classes, or another name to the class {alone.name}"
                )
            pairs = [{"train": [alone]}]
        if not pairs:
            return {"train": self._source}
        alike = [[pair["train"][0] for pair in pairs], *pairs[0].values()]
        if several := next((paths for paths in alike if len(paths) > 1), None):
            raise DataError(
                f"{self._source} holds several folders for one split, {few([path.name for path in several])}: keep one "
                f"of them, or move all images into one"
            )
        found = {split: self._inner(paths[0], split) for split, paths in pairs[0].items()}
        for path in files:
            self._skip(NO_CLASS if path.suffix.lower() in SUFFIXES else NO_IMAGES, path)
        for folder in folders:
            if [folder] not in pairs[0].values():
                self._skip_all(BESIDE, folder)
        classes = {folder.name for folder in self._list(found["train"])[0]}
        for split in [name for name in found if name != "train"]:
            inside = [folder.name for folder in self._list(found[split])[0]]
            if len(inside) < 2 and not classes & {*inside}:
                self._skip_all(UNLABELLED, found.pop(split))
        if "val" in found:
            if "test" in found:
                self._skip_all(VALIDATION, found.pop("val"))
            else:
                found["test"] = found.pop("val")
        self._read = [folder.resolve() for folder in found.values()]
        return found

    def _inner(self, folder: Path, split: str) -> Path:
        """The folder in which the classes of a split are: a folder seg_train may hold one more seg_train alone."""
        folders, files = self._list(folder)
        while len(folders) == 1 and not files and (split_of(folders[0].name) or ("",))[0] == split:
            (folder,) = folders
            folders, files = self._list(folder)
        return folder

    def classes(self, folder: Path) -> Files:
        """The images of each class in a folder. Raises DataError for a class without images, or whose name is not
        UTF-8."""
        folders, loose = self._list(folder)
        for path in loose:
            self._skip(NO_CLASS if path.suffix.lower() in SUFFIXES else NO_IMAGES, path)
        for of_class in folders:
            if not is_text(of_class.name):
                raise DataError(f"{of_class}: the name of this class is not UTF-8: rename the folder")
        files = {of_class.name: self.below(of_class) for of_class in folders}
        if empty := [name for name, paths in files.items() if not paths]:
            raise DataError(
                f"{folder} has no images for {few(empty)}: put files there ({', '.join(SUFFIXES)}), or remove the "
                f"folder"
            )
        return files

    def _images(self, folder: Path) -> list[Path]:
        return [path for path in self._list(folder)[1] if path.suffix.lower() in SUFFIXES]

    def _list(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the files in a folder, sorted, without hidden ones and without links to what is read."""
        if folder not in self._listed:
            folders, files = self._listed[folder] = [], []
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") or path.name == "__MACOSX":
                    self._skip(HIDDEN, path)
                elif not path.is_dir():
                    files.append(path)
                elif not path.is_symlink() or self._leads_elsewhere(path):
                    folders.append(path)
                else:
                    self._skip(LINKS, path)
        return self._listed[folder]

    def _leads_elsewhere(self, link: Path) -> bool:
        """Whether a link leads to a folder that is not read yet, neither a part of it nor what it is in."""
        target = link.resolve()
        if any(target == read or target in read.parents or read in target.parents for read in self._read):
            return False
        self._read.append(target)
        return True

    def _skip(self, reason: str, path: Path) -> None:
        self._skipped.setdefault(reason, {})[path] = None

    def _skip_all(self, reason: str, folder: Path) -> None:
        """Skip all files below a folder; the folder itself where it has none."""
        paths = sorted(Path(at, name) for at, _, names in os.walk(folder) for name in names)
        for path in paths or [folder]:
            self._skip(reason, path)

    def _divided(self, files: Files, test_fraction: float) -> dict[str, Files]:
        """The files divided into `train` and `test`, class by class. Raises DataError for a class with a single
        image."""
        if single := [name for name, paths in files.items() if len(paths) == 1]:
            raise DataError(
                f"{self._source} has a single image for {few(single)}, too few for a train and a test split: add "
                f"images, or remove the folder"
            )
        train, test = {}, {}
        for name, paths in files.items():
            ordered = sorted(paths, key=lambda path: sort_key(path, self._source))
            count = min(max(round(test_fraction * len(ordered)), 1), len(ordered) - 1)
            test[name], train[name] = ordered[:count], ordered[count:]
        return {"train": train, "test": test}

    def _too_few(self, folder: Path, classes: list[str]) -> str:
        """The message about a folder with one class or none."""
        held = f"one class, {classes[0]}" if classes else "no classes"
        inside = folder / classes[0] if classes else folder
        nested = f", for example {inside}" if classes and len(self._list(inside)[0]) > 1 else ""
        return (
            f"{folder} holds {held}: give a folder with a folder of images for each class, at least two, or with two "
            f"such folders train and test{nested}"
        )
