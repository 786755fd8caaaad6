"""Exports a trained network to files that can be used elsewhere, with a model card.

    dist-train export runs/block94-seed0-1a2b3c4d

CHECKPOINT is a checkpoint, a run folder, of which the newest is taken, or a model.safetensors. The files are:

    model.safetensors  the weights, with configuration and classes in the metadata; dist_train.load reads it
    model.pt2          torch.export: float32 images (N, C, H, W) from 0 to 1, any N, to logits
    model.onnx         the same for ONNX Runtime and others; needs pip install onnx onnxscript onnxruntime
    pictures.py        reads a picture as the training images were read; needs numpy and Pillow
    config.toml        the configuration, without the folders of this machine
    README.md          the model card

Each file with the network is read back, and its logits are compared with those of the checkpoint: on test images where
the run's betons exist, else on random ones. Exit code: 0 done; 1 a file's logits differ, or a format named by --format
could not be written; 2 bad input.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dist_train.command_line import Parser, check_path, command
from dist_train.errors import DONE, FAILED, UserError, say
from dist_train.inference.export import WRITTEN, export
from dist_train.inference.trained_network import load
from dist_train.runs.layout import EXPORT, EXPORTED, run_of


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("export", __doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, a run folder or a model.safetensors"
    )
    parser.add_argument("--format", nargs="+", choices=EXPORTED, help="formats to write (default: all)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder to write to (default: export, in the run folder or beside the checkpoint)",
    )
    options = parser.parse_args(arguments)
    formats, code = [*dict.fromkeys(options.format or EXPORTED)], DONE

    network = load(options.checkpoint, "cpu")
    run_dir = options.checkpoint if options.checkpoint.is_dir() else run_of(options.checkpoint)
    out = options.out or (run_dir or options.checkpoint.parent) / EXPORT
    check_path("--out", out)
    # an export may replace an earlier one
    present = [name for name in WRITTEN if (out / name).exists()]
    if present and not any((out / name).exists() for name in EXPORTED.values()):
        raise UserError(f"--out {out}: holds {present[0]}, which is not of an export; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if "onnx" in formats and missing:
        say(f"{EXPORTED['onnx']} needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
        formats.remove("onnx")
        code = FAILED if options.format else DONE
    try:
        wrong = export(network, out, formats, run_dir) if formats else []
    except OSError as error:
        say(f"{out}: cannot be written ({error.strerror}); make room, or name another folder with --out")
        return FAILED
    for sentence in wrong:
        say(sentence)
    return FAILED if wrong else code
