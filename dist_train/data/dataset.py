"""The data set of a run: checks that it exists or can be written, and that it fits the configuration."""

from __future__ import annotations

import re
import shlex

from dist_train import data_prep
from dist_train.config.settings import DataConfig
from dist_train.errors import UserError

# data_prep's messages name its own options; the trainer's messages name these settings instead
_SETTING_OF_OPTION = {
    "--dataset digits": "--preset digits",
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
        return data_prep.prepare(config.dataset, config.folder, config.source_folder, image_size=config.image_size)
    except data_prep.DataError as error:
        sentence, run, command = str(error).partition("python -m ")
        for option, setting in _SETTING_OF_OPTION.items():
            sentence = re.sub(rf"(?<![\w-]){option}(?![\w-])", setting, sentence)
        raise type(error)(sentence + run + command) from error


def manifest(config: DataConfig) -> data_prep.Manifest:
    """Check the betons and return their manifest. Raises UserError."""
    check(config)
    write = data_prep.command(config.dataset, config.folder, config.source_folder, config.image_size)
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
        write = data_prep.command(config.dataset, other, config.source_folder, config.image_size)
        raise UserError(
            f"data.dir = {config.folder} holds images of {width}x{height} pixels, but data.image_size = "
            f"{config.image_size}; set {shlex.quote(f'data.dir={other}')} and write that with {write}"
        )
    return betons


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
    ends = [smaller.until_epoch for smaller in config.smaller]
    if ends != sorted(set(ends)):
        raise UserError(f"data.smaller: until_epoch must rise from one size to the next, not {ends}; sort them")
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
    count = manifest.splits["train"].count
    if config.holdout + batch_size > count:
        raise UserError(
            f"data.holdout = {config.holdout} and train.batch_size = {batch_size} need more than the "
            f"{count} training images of {manifest.dataset}; lower one of them"
        )
