"""Makes files of a trained network that can be used elsewhere, and a model card that describes them.

    python -m dist_train.export runs/block94-seed0-1a2b3c4d

CHECKPOINT is a checkpoint, a run folder, of which the newest is taken, or a model.safetensors. Written are:

    model.safetensors  the weights, with configuration and classes in the metadata; dist_train.load reads it
    model.pt2          torch.export: float32 images (N, C, H, W) from 0 to 1, any N, to logits
    model.onnx         the same for ONNX Runtime and others; needs pip install onnx onnxscript onnxruntime
    config.toml        the configuration, without the folders of this machine
    README.md          the model card

Each is read back, and its logits compared with those of the network, on test images where the run's betons are there
and else on random ones. Exit code: 0 done; 1 a file's logits differ, or one that was asked for could not be made;
2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.errors import UserError, command, say
from dist_train.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from dist_train.trained import TrainedNetwork

FILES = {"safetensors": "model.safetensors", "torch": "model.pt2", "onnx": "model.onnx"}
_TOLERANCE = 1e-4  # of the largest logit
_IMAGES = 256
_PARTS = (1, 8)  # where these are cut into batches


def as_safetensors(network: TrainedNetwork) -> bytes:
    """The weights and, row by row, the BatchNorm statistics: bit for bit those of the training."""
    from safetensors.torch import save

    from dist_train.trained import stamp

    weights = {name: tensor.contiguous() for name, tensor in network.network.state_dict().items()}
    return save(weights, {"format": "pt", **stamp(network)})


def as_graph(network: TrainedNetwork) -> ExportedProgram:
    """The graph from float32 images (N, C, H, W) from 0 to 1, any N, to logits."""
    import torch

    from dist_train.model import BatchNorm

    network = deepcopy(network)
    for module in network.modules():
        if isinstance(module, BatchNorm):  # some runtimes take only constants for these
            module.rows_mean, module.rows_var = module.rows_mean.mean(0, True), module.rows_var.mean(0, True)
    height, width, channels = network.image_shape
    with torch.no_grad():
        program = torch.export.export(
            network,
            (torch.zeros(2, channels, height, width),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def as_torch(network: TrainedNetwork, program: ExportedProgram) -> bytes:
    """The graph as `torch.export.load` takes it, with the `stamp` as extra files."""
    import torch

    from dist_train.trained import stamp

    file = io.BytesIO()
    torch.export.save(program, file, extra_files=stamp(network))
    return file.getvalue()


def as_onnx(network: TrainedNetwork, program: ExportedProgram) -> bytes:
    """The graph as ONNX, with the `stamp` as metadata."""
    import torch

    from dist_train.trained import stamp

    made = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.clear()  # likewise
    made.model.metadata_props.update(stamp(network))
    content: bytes = made.model_proto.SerializeToString()
    return content


def reader(path: Path) -> Callable[[Tensor], Tensor]:
    """The network in an exported file: float32 images (N, C, H, W) from 0 to 1 to logits."""
    import torch

    from dist_train.trained import load

    if path.suffix == ".safetensors":
        return load(path, "cpu").logits
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnx
    import onnxruntime

    onnx.checker.check_model(path, full_check=True)
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def images_to_compare(network: TrainedNetwork) -> tuple[Tensor, str]:
    """(N, C, H, W) from 0 to 1, and what they are: test images where the run's betons are there, else random ones."""
    import torch

    from dist_train import data_prep

    with contextlib.suppress(data_prep.DataError):
        folder = network.config.data.folder
        found = data_prep.check(folder)
        if found.splits["test"].content_sha256 == network.content_sha256["test"]:
            pixels = torch.from_numpy(data_prep.read_split(folder, "test")[0][:_IMAGES])
            return pixels.permute(0, 3, 1, 2) / 255, f"{len(pixels)} test images of {network.dataset}"
    height, width, channels = network.image_shape
    noise = torch.rand(_IMAGES, channels, height, width, generator=torch.Generator().manual_seed(0))
    return noise, f"{_IMAGES} images of random pixels, as the test images of {network.dataset} were not there"


def _logits(read: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([read(part) for part in torch.tensor_split(images, _PARTS) if len(part)])


def export(network: TrainedNetwork, out: Path, formats: list[str], run_dir: Path | None) -> list[str]:
    """Write the files and the card into the folder `out`, and a line for each to stdout. Returns what is wrong with
    those that failed the comparison; they are removed again. Raises OSError."""
    from dist_train import config
    from dist_train.card import Check, Checked, card
    from dist_train.record import RecordConfig

    images, which = images_to_compare(network)
    expected = _logits(network.logits, images)
    largest = expected.abs().max().item()
    network = copy(network)  # the files have nothing of this machine
    data = replace(network.config.data, dir="", source="")
    network.config = replace(network.config, data=data, record=RecordConfig())

    print(f"{'file':17}  {'bytes':>10}  largest difference  same answers", flush=True)
    checks, wrong = [], []
    program = cache(lambda: as_graph(network))
    contents: dict[str, Callable[[], bytes]] = {
        "safetensors": lambda: as_safetensors(network),
        "torch": lambda: as_torch(network, program()),
        "onnx": lambda: as_onnx(network, program()),
    }
    for name in formats:
        path = out / FILES[name]
        with _quiet():
            content = contents[name]()
            write_atomic(path, content)
            found = _logits(reader(path), images)
        difference = (found - expected).abs().max().item()
        same = int((found.argmax(1) == expected.argmax(1)).sum())
        print(f"{path.name:17}  {len(content):10,}  {difference:18.2g}  {same} of {len(images)}", flush=True)
        if difference <= _TOLERANCE * largest:
            checks.append(Check(path.name, len(content), hashlib.sha256(content).hexdigest(), difference, same))
        else:
            path.unlink()
            wrong.append(
                f"{path}: its logits differ by {difference:.2g} where they are up to {largest:.2g}, more than one in "
                f"{1 / _TOLERANCE:,.0f}; it is removed"
            )
    write_atomic(out / "config.toml", config.to_toml(network.config).encode())
    write_atomic(out / "README.md", card(network, run_dir, Checked(len(images), which, largest, checks)).encode())
    print(f"compared on {which}, with logits of up to {largest:.3g}; described in {out / 'README.md'}", flush=True)
    return wrong


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks, which are about torch and not about the network."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _run_dir(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint is or lies in."""
    if checkpoint.is_dir():
        return checkpoint
    above = checkpoint.resolve().parent.parent
    return above if (above / "config.toml").exists() and (above / "checkpoints" / checkpoint.name).exists() else None


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    described = argparse.ArgumentParser(
        prog="python -m dist_train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="of the network")
    described.add_argument("--format", nargs="+", choices=FILES, help="what to write (default: all)")
    described.add_argument(
        "--out", metavar="DIR", type=Path, help="where to (default: export, in the run folder or beside the checkpoint)"
    )
    options = described.parse_args(arguments)
    formats, code = [*dict.fromkeys(options.format or FILES)], 0

    from dist_train.trained import load

    network = load(options.checkpoint, "cpu")
    run_dir = _run_dir(options.checkpoint)
    out = options.out or (run_dir or options.checkpoint.parent) / "export"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if "onnx" in formats and missing:
        say(f"{FILES['onnx']} needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
        formats.remove("onnx")
        code = 1 if options.format else 0
    try:
        wrong = export(network, out, formats, run_dir) if formats else []
    except OSError as error:
        say(f"{out}: cannot be written ({error.strerror}); make room, or name another folder with --out")
        return 1
    for sentence in wrong:
        say(sentence)
    return 1 if wrong else code


if __name__ == "__main__":
    sys.exit(main())
