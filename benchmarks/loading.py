"""Measures the augmented training images a second of the loaders and of torchvision's DataLoader, on two cores.

    python -m benchmarks.loading [--data data/cifar10] [--cifar10 DIR] [--rounds 9] [--out FILE]

Mirrored, shifted by up to two pixels, normalised float32 images on the CPU, in batches of 250. Every loader has
processes of its own, with one thread of torch each; all take turns. `stream` is measured through ffcv and without it,
from a memory map; and for both also reading alone: raw pixels, not augmented. Prints a Markdown table with
medians (quartiles) over the rounds, the ratio to torchvision's best number of workers in the same round, and the
seconds from building the loader to its first batch, where ffcv compiles.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from benchmarks import arguments
from benchmarks.table import measured_on, publish, spread, table
from dist_train import data_prep
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.config.settings import DataConfig, TrainConfig
from dist_train.data.batches import Data
from dist_train.data_prep import ffcv_library
from dist_train.distributed.ranks import Ranks
from dist_train.errors import DONE, UserError
from dist_train.randomness import permutation

BATCH, MICROBATCHES = 2000, 8  # of the preset block94
SIZE = BATCH // MICROBATCHES
TORCHVISION_IMAGES = 2500  # in an epoch of torchvision, which is slow; epochs of the others have 50,000

Loader = Literal["resident", "stream"]
MAP = "from a memory map"
Epoch = Callable[[], Iterator[int]]  # begins an epoch, and iterates over the numbers of images in its batches


def torchvision_loader(folder: str, manifest: data_prep.Manifest, workers: int) -> Epoch:
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomCrop(32, padding=2, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(manifest.mean, manifest.std),
    ]
    images = Subset(datasets.CIFAR10(folder, transform=transforms.Compose(steps)), range(TORCHVISION_IMAGES))
    loader = DataLoader(images, SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (len(labels) for _, labels in loader)


def ffcv_loader(folder: str, manifest: data_prep.Manifest) -> Epoch:
    """ffcv with its own augmentations; its RandomTranslate fills the border with one colour, ours reflects."""
    ffcv_library.version()  # imports ffcv, faster than a plain import
    import ffcv.loader
    import numpy as np
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, ToTensor, ToTorchImage

    mean, std = (255 * np.array(values) for values in (manifest.mean, manifest.std))
    images = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=2, fill=tuple(mean.astype(int)))]
    images += [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    loader = ffcv.loader.Loader(
        str(Path(folder) / manifest.splits["train"].file),
        batch_size=SIZE,
        num_workers=len(os.sched_getaffinity(0)),
        os_cache=True,
        order=ffcv.loader.OrderOption.RANDOM,
        seed=0,
        pipelines={"image": images, "label": [IntDecoder(), ToTensor()]},
    )
    return lambda: (len(labels) for _, labels in loader)


def our_loader(
    folder: str,
    manifest: data_prep.Manifest,
    loader: Loader,
    reader: str,
    reading_only: bool,
    rank: int,
    world_size: int,
) -> Epoch:
    """reader: of `stream`, through ffcv or from a memory map. reading_only: read the rank's share of the images,
    without augmentation."""
    if reader == MAP:
        ffcv_library.version = lambda: None  # type: ignore[assignment]
    config = DataConfig(manifest.dataset, folder, loader=loader, flip="random")
    cpu = torch.device("cpu")
    train = TrainConfig(batch_size=BATCH, microbatches=MICROBATCHES)
    data = Data(config, train, manifest, Ranks(rank, world_size, cpu, cpu))
    if reading_only:
        order = permutation(manifest.splits["train"].count, 0)[rank::world_size]
        return lambda: (len(labels) for _, labels, _ in data.sources["train"].batches(order, SIZE))
    steps = data.steps(0)

    def epoch() -> Iterator[int]:
        for _ in range(data.steps_per_epoch):
            for microbatch in next(steps):
                yield len(microbatch.labels)

    return epoch


def serve(make: Callable[[], Epoch], pipe: Connection) -> None:
    """In a process of its own: send the seconds until the first batch. Then run an epoch for every message received,
    and send its number of images and when it began and ended."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    epoch = make()
    batches = epoch()
    next(batches)
    pipe.send(time.perf_counter() - begin)
    sum(batches)
    with suppress(EOFError):  # the pipe is closed at the end of the measurement, or when another process failed
        while pipe.recv():
            begin = time.perf_counter()
            images = sum(epoch())
            pipe.send((images, begin, time.perf_counter()))


def rate(pipes: list[Connection]) -> float:
    """Images a second of an epoch that all these processes run at once."""
    for pipe in pipes:
        pipe.send(True)
    images, begins, ends = zip(*(pipe.recv() for pipe in pipes), strict=True)
    return float(sum(images) / (max(ends) - min(begins)))


@answers_bad_input
def main() -> int:
    parser = arguments.parser("loading", __doc__)
    parser.add_argument("--data", default="data/cifar10", help="folder of the betons")
    parser.add_argument("--cifar10", default=os.environ.get("CIFAR10_DIR"), help="folder of cifar-10-batches-py")
    parser.add_argument("--rounds", type=positive, default=9)
    arguments.add_out(parser)
    args = parser.parse_args()
    if args.cifar10 and not (Path(args.cifar10) / "cifar-10-batches-py").is_dir():
        raise UserError(f"--cifar10 {args.cifar10}: it has no folder cifar-10-batches-py; name another, or none")
    manifest = data_prep.check(Path(args.data))
    if manifest.splits["train"].count < BATCH:
        raise UserError(f"--data {args.data}: it has fewer training images than a batch, {BATCH}; name another folder")
    kinds: dict[str, list[Callable[[], Epoch]]] = {}
    if args.cifar10:
        for workers in (0, 1, 2):
            kinds[f"torchvision, num_workers={workers}"] = [
                partial(torchvision_loader, args.cifar10, manifest, workers)
            ]
    if ffcv_library.version():
        kinds["ffcv with its own augmentations, num_workers=2"] = [partial(ffcv_loader, args.data, manifest)]
    loaders: list[tuple[str, Loader, str, bool]] = [("`resident`", "resident", "", False)]
    for reader in ("through ffcv", MAP) if ffcv_library.version() else (MAP,):
        loaders += [
            (f"`stream` {reader}", "stream", reader, False),
            (f"reading alone, {reader}", "stream", reader, True),
        ]
    for title, loader, reader, reading_only in loaders:
        make = partial(our_loader, args.data, manifest, loader, reader, reading_only)
        for count in (1, 2):
            name = f"{title}, {count} process" + "es" * (count > 1)
            kinds[name] = [partial(make, rank, count) for rank in range(count)]

    context = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {name: [] for name in kinds}
    starts: dict[str, float] = {}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    try:
        for name, makes in kinds.items():
            for make_epoch in makes:
                pipe, child_pipe = context.Pipe()
                pipes[name].append(pipe)
                context.Process(target=serve, args=(make_epoch, child_pipe)).start()
                child_pipe.close()
            starts[name] = max(pipe.recv() for pipe in pipes[name])
        for _ in range(args.rounds):
            for name in kinds:
                rates[name].append(rate(pipes[name]))
    finally:
        for connections in pipes.values():
            for pipe in connections:
                pipe.close()

    peers = [values for name, values in rates.items() if name.startswith("torchvision")]
    best = max(peers, key=statistics.median, default=None)
    rows = []
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, best, strict=True)] if best else []
        rows.append([name, spread(values, 0), spread(ratios, 1) if ratios else "", f"{starts[name]:.1f}"])
    headers = ["loader", "images/s", "times torchvision's best", "first batch after, s"]
    conditions = f"n = {args.rounds}; {measured_on(torch.device('cpu'), os.cpu_count() or 1)}"
    publish("benchmarks.loading", conditions, table(headers, rows), args.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
