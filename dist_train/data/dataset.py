"""The data set of a run: checks that it exists or can be written, and that it fits the configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train import data_prep
from dist_train.config.settings import DataConfig
from dist_train.data_prep.folders import split_of
from dist_train.errors import UserError

# data_prep's messages name its own options; the trainer's messages name these settings instead
_SETTING_OF_OPTION = {
    "--dataset digits": "--preset digits",
    "--drop-equal": "data.drop_equal",
    "--dataset": "data.dataset",
    "--image-size": "data.image_size",
    "--out": "data.dir",
    "--source": "data.source",
}


def is_written(config: DataConfig) -> bool:
    """Whether the betons exist; they may be damaged, but not partial, since their folder is written atomically."""
    try:
        return (config.folder / data_prep.MANIFEST).exists()
    except OSError:  # reported by `prepare`
        return False


def check(config: DataConfig) -> None:
    """Raises UserError for a data set that does not exist and cannot be written with these settings."""
    empty = _is_empty(config)
    if config.dataset in data_prep.DATASETS:
        if config.image_size:
            raise UserError(
                f"data.image_size = {config.image_size}: {config.dataset} has images of a fixed size; remove it, "
                f"or give images of your own another name with data.dataset"
            )
    elif empty:
        if not config.source:
            raise UserError(
                f"data.dataset = {config.dataset}: there is no such data set; choose one of "
                f"{', '.join(data_prep.DATASETS)}, or set data.source to a folder of images of your own"
            )
        if not config.image_size:
            raise UserError(
                f"data.image_size = 0: the images of {config.dataset} need a size; set the side in pixels, such as 64"
            )


def prepare(config: DataConfig) -> data_prep.Manifest:
    """Check the betons and return their manifest; write them first where the folder is missing or empty. Several
    processes may call this at once: one writes while the others wait. Raises UserError."""
    if not _is_empty(config):
        return manifest(config)
    check(config)
    try:
        return data_prep.prepare(
            *(config.dataset, config.folder, config.source_folder),
            image_size=config.image_size,
            drop_equal=config.drop_equal,
        )
    except data_prep.DataError as error:
        sentence, run, command = str(error).partition("python -m ")
        for option, setting in _SETTING_OF_OPTION.items():
            sentence = re.sub(rf"(?<![\w-]){option}(?![\w-])", setting, sentence)
        raise type(error)(sentence + run + command) from error


def manifest(config: DataConfig) -> data_prep.Manifest:
    """Check the betons and return their manifest. Raises UserError."""
    check(config)
    write = _command(config, config.folder)
    if _is_empty(config):
        raise UserError(f"data.dir = {config.folder}: there is no data set; write it with {write}")
    betons = data_prep.check(config.folder, write)
    if betons.dataset != config.dataset:
        raise UserError(
            f"data.dir = {config.folder} holds {betons.dataset}, but data.dataset = {config.dataset}; "
            f"name the right folder or data set"
        )
    if not data_prep.same_source(betons, config.source_folder):
        raise UserError(
            f"data.dir = {config.folder} holds the images of {betons.source}, but data.source = {config.source}; give "
            f"these another data.dataset, or remove data.source"
        )
    height, width, _ = betons.image_shape
    if config.image_size and (height, width) != (config.image_size, config.image_size):
        other = config.folder.with_name(f"{config.dataset}-{config.image_size}")
        raise UserError(
            f"data.dir = {config.folder} holds images of {width}x{height} pixels, but data.image_size = "
            f"{config.image_size}; set {shlex.quote(f'data.dir={other}')} and write that with {_command(config, other)}"
        )
    if config.drop_equal and data_prep.may_share_images(betons):
        other = config.folder.with_name(f"{config.dataset}-drop-equal")
        raise UserError(
            f"data.dir = {config.folder} was written without data.drop_equal = true; set "
            f"{shlex.quote(f'data.dir={other}')} and write that with {_command(config, other)}"
        )
    return betons


def is_own(folder: Path, dataset: str, content_sha256: dict[str, str]) -> bool:
    """Whether a folder holds the betons of a run's own data set: those with its name and its content. content_sha256:
    of each split; empty where it is not known. Raises UserError for damaged betons."""
    if not (folder / data_prep.MANIFEST).exists():
        return False
    betons = data_prep.check(folder)
    content = {name: split.content_sha256 for name, split in betons.splits.items()}
    return betons.dataset == dataset and content_sha256 in ({}, content)


def read_labelled(
    folder: Path, split: str, classes: tuple[str, ...], image_shape: tuple[int, int, int], grey_bits: int | None
) -> tuple[str, NDArray[np.uint8], NDArray[np.int64]]:
    """A labelled data set to evaluate a network of `classes` on: its name, the images, (N, H, W, C), and the labels,
    (N,), as the network numbers its classes.

    folder: of betons, or of images in a folder for each class; its classes are some of the network's, or all of them.
    split: `train` or `test`, where the folder has splits. grey_bits: as in `data_prep.pictures.read_picture`. Raises
    UserError.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder; name one with betons, or with images by class")
    if not (folder / data_prep.MANIFEST).exists():
        images, labels = data_prep.load_labelled(folder, split, classes, image_shape[0], grey_bits)
        *_, above, name = ["", *folder.resolve().parts]
        return f"{above}/{name}" if split_of(name) else name, images, labels
    betons = data_prep.check(folder)
    if unknown := [name for name in betons.classes if name not in classes]:
        raise UserError(
            f"--data {folder}: has classes that the network does not have, {', '.join(unknown[:3])}; name a folder "
            f"with the network's classes"
        )
    if betons.image_shape != image_shape:
        height, width, _ = betons.image_shape
        raise UserError(
            f"--data {folder}: has images of {width}x{height} pixels, where the network takes "
            f"{image_shape[1]}x{image_shape[0]}; name the folder of the images themselves, which are scaled"
        )
    images, labels = data_prep.read_split(folder, split)
    return betons.dataset, images, np.array([classes.index(name) for name in betons.classes], np.int64)[labels]


def _command(config: DataConfig, folder: Path) -> str:
    """The command that writes the data set into a folder."""
    return data_prep.command(
        *(config.dataset, folder, config.source_folder, config.image_size), drop_equal=config.drop_equal
    )


def _is_empty(config: DataConfig) -> bool:
    """Whether the betons' folder is missing or empty. Raises UserError."""
    try:
        return not any(config.folder.iterdir())
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        raise UserError(f"data.dir = {config.folder} is a file, or lies in one; name a folder") from None
    except OSError as error:
        raise UserError(
            f"data.dir = {config.folder}: cannot be read ({error.strerror}); name another folder, or change its "
            f"permissions"
        ) from None


def check_images(config: DataConfig, manifest: data_prep.Manifest, batch_size: int) -> None:
    """Raises UserError when the images are too small for the settings, or the training set is too small for a batch."""
    ends = [smaller.until for smaller in config.smaller]
    if ends != sorted(set(ends)):
        raise UserError(f"data.smaller: until must rise from one size to the next, not {ends}; sort them")
    if too_large := [s.size for s in config.smaller if s.size > min(manifest.image_shape[:2])]:
        raise UserError(
            f"data.smaller: size = {too_large[0]} is larger than the images of {manifest.dataset} "
            f"({manifest.image_shape[0]}x{manifest.image_shape[1]} pixels); make it smaller"
        )
    if config.translate >= min(manifest.image_shape[:2]):
        raise UserError(
            f"data.translate = {config.translate} shifts images of {manifest.image_shape[1]}x"
            f"{manifest.image_shape[0]} pixels out of sight; use at most {min(manifest.image_shape[:2]) - 1}"
        )
    if config.cutout > min(manifest.image_shape[:2]):
        raise UserError(
            f"data.cutout = {config.cutout} is larger than the images of {manifest.dataset} "
            f"({manifest.image_shape[1]}x{manifest.image_shape[0]} pixels); make it smaller"
        )
    count = manifest.splits["train"].count
    if config.holdout + batch_size > count:
        raise UserError(
            f"data.holdout = {config.holdout} and train.batch_size = {batch_size} need more than the "
            f"{count} training images of {manifest.dataset}; lower one of them"
        )
