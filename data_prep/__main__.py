"""Write a data set into files of ffcv's format: train.beton, test.beton and manifest.json.

    dist-train prepare --dataset cifar10
    dist-train prepare --dataset mine --source FOLDER --image-size 64

A folder that already holds the data set is only checked. The data set is cifar10, digits, or one of your own: a folder
with a folder of images for each class, or with two such folders train and test (or val). What is skipped of it is
counted and named. python -m dist_train.data_prep is the same command. Exit codes: 0 the data set is ready; 2 bad input;
3 CIFAR-10 had to be downloaded, but there is no network.
"""

import sys
import time
from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.data_prep.betons import prepare, verify
from dist_train.data_prep.datasets import DATASETS
from dist_train.data_prep.files import DataError
from dist_train.data_prep.folders import TEST_FRACTION
from dist_train.errors import UserError, say, show

_INTERRUPTED = 130  # exit code


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("prepare", __doc__)
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"the data set: {', '.join(DATASETS)}, or a name for images of your own (default: cifar10)",
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="folder of images of your own, or the one that contains cifar-10-batches-py (default: $CIFAR10_DIR, else "
        "download CIFAR-10 into ~/.cache/dist_train/cifar10)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="side of your own images: the shorter side is scaled to it, and the middle of the longer one kept",
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        metavar="SHARE",
        help=f"share of each class that is for testing, where your folder has no test split (default: {TEST_FRACTION})",
    )
    parser.add_argument(
        "--drop-equal",
        action="store_true",
        help="drop training images that have the pixels of a test image",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: data/<name of the data set>)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="write nothing: read everything and compare with the manifest"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write the folder again even if it is complete or damaged",
    )
    args = parser.parse_args(arguments)
    writing = (args.force, args.source, args.image_size, args.test_fraction is not None, args.drop_equal)
    if args.verify and any(writing):
        parser.error("--verify writes nothing: use it with --dataset and --out only")
    dataset: str = args.dataset or "cifar10"
    out: Path = args.out or Path("data") / dataset

    start = time.monotonic()
    try:
        if args.verify:
            manifest = verify(out)
            if args.dataset and manifest.dataset != args.dataset:
                raise DataError(
                    f"{out} holds the data set {manifest.dataset}, not {args.dataset}: choose another --out"
                )
        else:
            manifest = prepare(
                dataset,
                out,
                args.source,
                image_size=args.image_size,
                test_fraction=args.test_fraction,
                drop_equal=args.drop_equal,
                force=args.force,
            )
    except ImportError as error:
        raise UserError(f"{error}: install the project's requirements") from None
    except KeyboardInterrupt:
        say("interrupted, no data set was written", "data_prep")
        return _INTERRUPTED
    counts = " and ".join(f"{split.count} {name}" for name, split in manifest.splits.items())
    size = "x".join(map(str, manifest.image_shape))
    state = "verified" if args.verify else "ready"
    seconds = time.monotonic() - start
    show(f"{out}: {manifest.dataset}, {counts} images of {size}, {state} ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
