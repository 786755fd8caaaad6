"""Evaluate a trained network as its training did: every image once, exactly, on any number of ranks.

    dist-train evaluate runs/block94-seed0-1a2b3c4d
    torchrun --nproc_per_node=4 -m dist_train evaluate CHECKPOINT --split holdout

    dist-train evaluate CHECKPOINT --data photographs/

The metrics of a run's last checkpoint are equal to those of the run itself. --data names another labelled data set, by
which the network is tested too; its name is in the result.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from dist_train.command_line import Parser, command
from dist_train.config.settings import Tta
from dist_train.data.batches import Data, Evaluated
from dist_train.data.dataset import is_own, manifest, read_labelled
from dist_train.data.loaders import Resident
from dist_train.distributed.device import autocast
from dist_train.distributed.ranks import join_ranks
from dist_train.errors import DONE, NotFiniteError, UserError, printable, show
from dist_train.inference.trained_network import load
from dist_train.reports.statistics import often_taken_for, proportion
from dist_train.runs.layout import is_run
from dist_train.runs.metrics import write_evaluation
from dist_train.training.evaluation import evaluate


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("evaluate", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, a run folder, or an exported safetensors")
    add(
        "--split",
        choices=("test", "holdout", "train"),
        default="test",
        help="the images to evaluate on (default: %(default)s)",
    )
    add("--tta", choices=get_args(Tta), help="test-time augmentation (default: the run's)")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the run's betons, or another data set with classes of the network: betons, or a folder of "
        "images for each class (default: the run's betons)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="the device to compute on (default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON in the format of a run's evaluation.json")
    add("--write", action="store_true", help="write evaluation.json in the run folder, for its report")
    args = parser.parse_args(arguments)

    if args.write and (not is_run(args.checkpoint) or args.split != "test"):
        raise UserError(f"--write: {args.checkpoint} is not a run folder, or --split is not test; remove --write")
    trained = load(args.checkpoint, "cpu")
    t, config = trained.config.train, trained.config.data
    other = args.data is not None and not is_own(args.data, trained.dataset, trained.content_sha256)
    if other and (args.write or args.split == "holdout"):
        setting = "--write" if args.write else "--split holdout"
        raise UserError(f"{setting}: {args.data} is not the data set of {args.checkpoint}; remove {setting}, or --data")
    config = dataclasses.replace(config, dir=str(args.data or config.dir))
    betons = labelled = None
    if other:
        labelled = read_labelled(args.data, args.split, trained.classes, trained.image_shape, trained.grey_bits)
    else:
        betons = manifest(config)
        if (betons.classes, betons.image_shape) != (trained.classes, trained.image_shape):
            raise UserError(
                f"{config.folder}: its classes or its image size are not those that {args.checkpoint} was trained on; "
                f"name the folder of {trained.dataset} with --data"
            )
    with join_ranks(args.device, t.threads, t.deterministic, t.timeout, t.backend) as ranks:
        data: Evaluated
        if betons:
            data = Data(config, t, betons, ranks)
        elif labelled:
            name, images, labels = labelled
            mean, std = (tuple(values.flatten().tolist()) for values in (trained.mean, trained.std))
            source, indices = Resident(images, labels, ranks.device), {args.split: torch.arange(len(labels))}
            described = (name, trained.classes, mean, std)
            data = Evaluated(*described, ranks, config.eval_batch, {args.split: source}, indices)
        if not len(data.indices[args.split]):
            raise UserError(f"--split {args.split}: this run has none, its data.holdout is 0; take another split")
        model = trained.network.to(ranks.device)
        tta = args.tta or trained.config.evaluate.tta
        try:
            evaluation = evaluate(model, data, args.split, ranks, autocast(ranks.device, t.precision), tta)
        except NotFiniteError as error:
            raise UserError(f"{args.checkpoint}: {error}; use an earlier checkpoint") from None
        if ranks.main:
            details = evaluation.details(data, trained.step)
            try:
                if args.json:
                    print(json.dumps(details), flush=True)
                else:
                    show(*as_text(details))
            finally:  # whichever of the two cannot be written, the other is
                if args.write:
                    write_evaluation(args.checkpoint, details)
    return DONE


def as_text(details: dict[str, Any]) -> list[str]:
    """The contents of an `evaluation.json` as lines for the terminal: the metrics, and a table of the classes."""
    images, confusion = details["images"], np.array(details["confusion"])
    low, high = proportion(int(confusion.trace()), images)
    lines = [
        f"{details['dataset']}, {details['split']}: {images:,} images, after step {details['step']:,}",
        f"accuracy {100 * details['accuracy']:.2f} % (95 %: {100 * low:.2f} to {100 * high:.2f}), "
        f"loss {details['loss']:.4f}",
    ]
    if "accuracy_tta" in details:
        lines.append(f"with TTA {100 * details['accuracy_tta']:.2f} %, loss {details['loss_tta']:.4f}")
    lines += [f"calibration error (15 bins) {details['calibration']['ece']:.4f}", ""]
    names = [printable(name) for name in details["classes"]]
    width = max(5, *map(len, names))
    lines.append(f"{'class':{width}}  images  accuracy  most often taken for")
    others = often_taken_for(details, names)
    for number, (name, row) in enumerate(zip(names, confusion, strict=True)):
        count = int(row.sum())
        share = f"{100 * row[number] / count:6.2f} %" if count else f"{'':8}"
        lines.append(f"{name:{width}}  {count:6,}  {share}  {others[number]}".rstrip())
    return lines
