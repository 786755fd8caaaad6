"""Classifies pictures.

    dist-train predict runs/block94-seed0-1a2b3c4d cat.jpg photos/ --top 3
    find photos -name '*.jpg' | dist-train predict CHECKPOINT - --json
    curl -s URL | dist-train predict CHECKPOINT -

CHECKPOINT is a checkpoint, a run folder, of which the newest is taken, or an exported model.safetensors. IMAGE is a
picture of any size and kind; or a folder, for all pictures in it and its subfolders, sorted by path, where what is
skipped is counted and named; or - for standard input, which is one picture if it begins like one, else a list of paths,
one a line. A picture is scaled until its shorter side fits, and cropped to its middle; an animation is represented by
its first frame. Results are printed a batch at a time. Exit code: 0 done; 1 pictures that could not be read, named on
stderr; 2 bad input.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from dist_train.command_line import Parser, command, positive
from dist_train.config.settings import Tta
from dist_train.data_prep.folders import images_below
from dist_train.data_prep.pictures import SUFFIXES
from dist_train.errors import DONE, FAILED, UserError, printable, say, show
from dist_train.inference.trained_network import TrainedNetwork, load

_HEAD = 16  # bytes from which a picture on standard input is recognised
_WITHOUT_ZERO = re.compile(rb"\xff\xd8\xff|GIF8[79]a|P[1-7]\s|RIFF.{4}WEBP", re.DOTALL)
_LARGEST = 1 << 30  # bytes of a picture on standard input
_BAR = 24  # characters of the bar for probability 1


class _Piped(io.BytesIO):
    """A picture that came on standard input."""

    name = "-"


Source = str | _Piped | UserError
Answer = list[tuple[str, float]]  # classes and probabilities, the likeliest first


def sources(images: Iterable[str]) -> Iterator[Source]:
    """Every picture that the arguments name, lazily; in place of a folder without pictures, its error."""
    for name in images:
        if name == "-":
            yield from _standard_input()
        elif _is_folder(name):
            yield from _in_folder(Path(name))
        else:
            yield name


def _is_folder(name: str) -> bool:
    """Whether it is a folder; not where that cannot be found out, which reading it as a picture reports."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def _in_folder(folder: Path) -> Iterator[Source]:
    try:
        paths, skipped = images_below(folder)
    except UserError as error:
        yield error
        return
    yield from map(str, paths)
    for part in skipped:
        say(f"{folder}: skipped {part}")
    if not paths:
        yield UserError(f"{folder}: holds no pictures ({', '.join(SUFFIXES)})")


def _standard_input() -> Iterator[Source]:
    stream = cast(io.BufferedReader, sys.stdin.buffer)
    head = stream.read(_HEAD)
    if begins_a_picture(head):
        content = head + stream.read(_LARGEST)
        if len(content) > _LARGEST:
            yield UserError(f"-: is larger than {_LARGEST >> 20} MiB; name a file")
        else:
            yield _Piped(content)
    else:
        lines = itertools.chain((head + stream.readline()).split(b"\n"), stream)
        yield from (os.fsdecode(line.rstrip(b"\n")) for line in lines if line.strip())


def begins_a_picture(head: bytes) -> bool:
    """Whether the first bytes on standard input are those of a picture, and not of a list of paths."""
    # A path has no zero byte. All kinds of pictures have one among the first 16 bytes, except for these.
    return not head or b"\0" in head or bool(_WITHOUT_ZERO.match(head))


def results(
    network: TrainedNetwork, pictures: Iterator[Source], batch: int, top: int, tta: Tta
) -> Iterator[tuple[str, Answer] | UserError]:
    """Each picture's name and its `top` likeliest classes with their probabilities, in order; in place of one that
    cannot be read, its error. batch: pictures in one forward pass."""

    def read(source: Source) -> npt.NDArray[np.uint8] | UserError:
        if isinstance(source, UserError):
            return source
        try:
            return network.read(source)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(pictures, batch)):
            decoded = list(pool.map(read, chunk))
            answers = iter(
                network.predict([pixels for pixels in decoded if not isinstance(pixels, UserError)], top, tta)
            )
            for source, pixels in zip(chunk, decoded, strict=True):
                if isinstance(pixels, UserError):
                    yield pixels
                else:
                    yield (source if isinstance(source, str) else _Piped.name), next(answers)


def as_text(name: str, answer: Answer, width: int) -> list[str]:
    """An answer as lines for the terminal. width: characters of the column with the classes."""
    if len(answer) == 1:
        return [f"{name}: {answer[0][0]} ({100 * answer[0][1]:.2f} %)"]
    return [
        name,
        *(f"    {printable(cls):{width}}  {100 * p:6.2f} %  {'█' * round(_BAR * p)}".rstrip() for cls, p in answer),
    ]


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("predict", __doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, a run folder or a model.safetensors"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=str, help="a picture, a folder of them, or -")
    parser.add_argument(
        "--top", metavar="N", type=positive, default=5, help="classes printed for each picture (default: 5)"
    )
    parser.add_argument(
        "--tta",
        choices=("none", "mirror", "shift"),
        default="none",
        help="average over the mirrored picture too, or over shifted ones as well (default: none)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print lines of {"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}',
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--batch", metavar="N", type=positive, default=64, help="pictures computed at a time (default: 64)"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit quietly at Ctrl-C
    warnings.simplefilter("ignore")  # Pillow warns of flaws in pictures that it can read

    network = load(options.checkpoint, options.device)
    code, width = DONE, max(len(printable(name)) for name in network.classes)
    for result in results(network, sources(options.images), options.batch, options.top, options.tta):
        if isinstance(result, UserError):
            say(str(result))
            code = FAILED
        elif options.json:
            name, answer = result
            predictions = [{"class": cls, "probability": p} for cls, p in answer]
            print(json.dumps({"image": name, "predictions": predictions}), flush=True)
        else:
            show(*as_text(*result, width))
    return code
