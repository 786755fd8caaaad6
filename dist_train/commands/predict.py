"""Says what is in pictures.

    dist-train predict runs/block94-seed0-1a2b3c4d cat.jpg photos/ --top 3
    find photos -name '*.jpg' | dist-train predict CHECKPOINT - --json
    curl -s URL | dist-train predict CHECKPOINT -

CHECKPOINT is a checkpoint, a run folder, of which the newest is taken, or an exported model.safetensors. IMAGE is a
picture of any size and kind; or a folder, of which all pictures are taken, sorted by path, with those of its
folders; or - for what comes on standard input: one picture if it begins like one, else paths, one a line. A picture is
scaled until its shorter side fits, and the middle is taken; of an animation it is the first frame. Results come a
batch at a time. Exit code: 0 done; 1 pictures that could not be read, named on stderr; 2 bad input.
"""

from __future__ import annotations

import io
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
from dist_train.data_prep.images import SUFFIXES
from dist_train.errors import DONE, FAILED, UserError, say
from dist_train.inference.trained_network import TrainedNetwork, load, read_image

_KINDS = (*SUFFIXES, ".gif")  # of a folder's files, by their names
_BAR = 24  # characters of the longest


class _Piped(io.BytesIO):
    """A picture that came on standard input."""

    name = "-"


Source = str | _Piped | UserError
Answer = list[tuple[str, float]]


def sources(images: Iterable[str]) -> Iterator[Source]:
    """Every picture that the command line names, as it is found; an error for a folder without any."""
    for name in images:
        if name == "-":
            yield from _standard_input()
        elif Path(name).is_dir():
            found = sorted(filter(_is_picture, Path(name).rglob("*")))
            yield from map(str, found)
            if not found:
                yield UserError(f"{name}: holds no pictures ({', '.join(_KINDS)})")
        else:
            yield name


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _KINDS and not path.name.startswith(".") and path.is_file()


def _standard_input() -> Iterator[Source]:
    stream = cast(io.BufferedReader, sys.stdin.buffer)
    head = stream.peek(16)[:16]
    # every kind of picture but these has a byte 0 there, which no path has
    if not head or b"\0" in head or re.match(rb"GIF8[79]a|P[1-6]\s", head):
        yield _Piped(stream.read())
    else:
        yield from (os.fsdecode(line.rstrip(b"\n")) for line in stream if line.strip())


def results(
    network: TrainedNetwork, pictures: Iterator[Source], batch: int, top: int, tta: Tta
) -> Iterator[tuple[str, Answer] | UserError]:
    """Each picture's name and likeliest classes with their probabilities, in order, or why it cannot be read."""

    def read(source: Source) -> npt.NDArray[np.uint8] | UserError:
        if isinstance(source, UserError):
            return source
        try:
            return read_image(source, network.image_shape[0])
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        while some := list(islice(pictures, batch)):
            found = list(pool.map(read, some))
            answers = iter(network.predict([pixels for pixels in found if not isinstance(pixels, UserError)], top, tta))
            for source, pixels in zip(some, found, strict=True):
                if isinstance(pixels, UserError):
                    yield pixels
                else:
                    yield (source if isinstance(source, str) else _Piped.name), next(answers)


def shown(name: str, answer: Answer, width: int) -> str:
    """An answer for the terminal. width: of the classes' column."""
    if len(answer) == 1:
        return f"{name}: {answer[0][0]} ({100 * answer[0][1]:.2f} %)"
    rows = [f"    {cls:{width}}  {100 * p:6.2f} %  {'█' * round(_BAR * p)}".rstrip() for cls, p in answer]
    return "\n".join([name, *rows])


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    described = Parser("predict", __doc__)
    described.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder or a model.safetensors")
    described.add_argument("images", metavar="IMAGE", nargs="+", help="a picture, a folder of them, or -")
    described.add_argument("--top", metavar="N", type=positive, default=5, help="classes shown of each (default: 5)")
    described.add_argument(
        "--tta",
        choices=("none", "mirror", "shift"),
        default="none",
        help="average over the mirrored picture too, or over shifted ones as well (default: none)",
    )
    described.add_argument(
        "--json",
        action="store_true",
        help='print lines of {"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}',
    )
    described.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    described.add_argument(
        "--batch", metavar="N", type=positive, default=64, help="pictures computed at a time (default: 64)"
    )
    options = described.parse_args(arguments)
    for number in (signal.SIGPIPE, signal.SIGINT):  # end quietly, like other commands, when `| head` has enough
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for any file's name
    warnings.simplefilter("ignore")  # Pillow's, of pictures that it reads all the same

    network = load(options.checkpoint, options.device)
    code, width = DONE, max(map(len, network.classes))
    for found in results(network, sources(options.images), options.batch, options.top, options.tta):
        if isinstance(found, UserError):
            say(str(found))
            code = FAILED
        elif options.json:
            name, answer = found
            predictions = [{"class": cls, "probability": p} for cls, p in answer]
            print(json.dumps({"image": name, "predictions": predictions}), flush=True)
        else:
            print(shown(*found, width), flush=True)
    return code
