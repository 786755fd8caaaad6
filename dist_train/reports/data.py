"""The data set of a run on the page: its classes, the numbers of its images, and some of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from dist_train import data_prep
from dist_train.data_prep.images import as_png
from dist_train.reports.plots import DATASETS
from dist_train.runs.metrics import Row
from dist_train.runs.run import Run

_NAMED = 12  # classes that are named, and shown in a picture
_SIDE = 64  # pixels of a picture at most


class Data:
    """What is known of a run's data set, from its last evaluation and from the betons where these still exist."""

    def __init__(self, run: Run) -> None:
        self.run, self.dataset = run, run.settings.data.dataset

    @cached_property
    def manifest(self) -> data_prep.Manifest | None:
        """The manifest of the betons; None where these are missing, damaged, or of other images than the run's."""
        try:
            manifest = data_prep.read_manifest(self.run.settings.data.folder)
        except data_prep.DataError:
            return None
        evaluation = self.run.evaluation or {}
        digests = {name: split.content_sha256 for name, split in manifest.splits.items()}
        same = (
            manifest.dataset == self.dataset
            and self.run.images in ({}, digests)
            and evaluation.get("classes", [*manifest.classes]) == [*manifest.classes]
            and (evaluation.get("split") != "test" or evaluation["images"] == manifest.splits["test"].count)
        )
        return manifest if same else None

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty where they are not known."""
        return [*self.manifest.classes] if self.manifest else (self.run.evaluation or {}).get("classes", [])

    @property
    def images(self) -> str:
        """The data set's name, and the numbers of its images as far as they are known."""
        name, evaluation = DATASETS.get(self.dataset, self.dataset), self.run.evaluation
        if self.manifest:
            height, width, _ = self.manifest.image_shape
            counts = " and ".join(f"{split.count:,} {name}" for name, split in self.manifest.splits.items())
            held_out = self.run.settings.data.holdout
            held = f", {held_out:,} of the former held out" if held_out else ""
            return f"{name}: {counts} images of {width}x{height} pixels{held}"
        if evaluation and evaluation["split"] == "test":
            return f"{name}: {evaluation['images']:,} test images"
        return name

    @property
    def names(self) -> str:
        """The number of classes and their names, of many only the first."""
        if not self.classes:
            return "not recorded"
        more = f", and {len(self.classes) - _NAMED} more" if len(self.classes) > _NAMED else ""
        return f"{len(self.classes)}: {', '.join(self.classes[:_NAMED])}{more}"

    def pictures(self) -> list[Row]:
        """Training images, the first of each class, or of some that are spread over all: their `label`, and `png` in
        base64. Empty where the betons cannot be read."""
        if self.manifest is None:
            return []
        try:
            beton = data_prep.open_split(self.run.settings.data.folder, "train")
        except data_prep.DataError:
            return []
        labels, first = np.unique(beton.labels, return_index=True)
        chosen = np.unique(np.linspace(0, len(labels) - 1, min(_NAMED, len(labels))).round().astype(np.int64))
        return [
            {"label": self.classes[label], "png": as_png(pixels, _SIDE)}
            for label, pixels in zip(labels[chosen].tolist(), beton.images(first[chosen]), strict=True)
        ]


def samples(data: Sequence[Data]) -> list[Row]:
    """For each distinct data set that can still be read: `images`, as of `Data.pictures`, and `words` about them."""
    distinct: dict[str, Data] = {}
    for each in data:
        if each.manifest:
            distinct.setdefault(each.manifest.splits["train"].content_sha256, each)
    found = []
    for each in distinct.values():
        if pictures := each.pictures():
            which = "each class" if len(pictures) == len(each.classes) else f"{len(pictures)} of the classes"
            of = f" of {DATASETS.get(each.dataset, each.dataset)}" if len(distinct) > 1 else ""
            found.append({"words": f"Training images{of}, one of {which}", "images": pictures})
    return found
