"""Files of a trained network for use elsewhere: safetensors, torch.export and ONNX, each checked after writing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.export import ExportedProgram

from dist_train import config, data_prep
from dist_train.config.settings import RecordConfig
from dist_train.data_prep import pictures
from dist_train.errors import show
from dist_train.files import write_atomic
from dist_train.inference.model_card import PICTURES, Check, Checked, Results, card
from dist_train.inference.trained_network import TrainedNetwork, load, stamp
from dist_train.runs.layout import EXPORTED, SETTINGS
from dist_train.runs.run import Run

CARD = "README.md"
WRITTEN = (*EXPORTED.values(), SETTINGS, CARD, PICTURES)
_TOLERANCE = 1e-4  # of the largest logit
_IMAGES = 256  # to compare the logits on
_PARTS = (1, 8)  # indices at which the images are split into batches, whose sizes differ


def as_safetensors(network: TrainedNetwork) -> bytes:
    """A safetensors file with the weights and the BatchNorm statistics, the same bits as in the checkpoint."""
    weights = {name: tensor.contiguous() for name, tensor in network.network.state_dict().items()}
    return save(weights, {"format": "pt", **stamp(network)})


def as_graph(network: TrainedNetwork) -> ExportedProgram:
    """The graph from float32 images (N, C, H, W) from 0 to 1, any N, to logits."""
    height, width, channels = network.image_shape
    with torch.no_grad():
        program = torch.export.export(
            network,
            (torch.zeros(2, channels, height, width),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has paths of this machine
    return program


def as_torch(network: TrainedNetwork, program: ExportedProgram) -> bytes:
    """A file of the graph for `torch.export.load`, with the `stamp` as extra files."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=stamp(network))
    return file.getvalue()


def as_onnx(network: TrainedNetwork, program: ExportedProgram) -> bytes:
    """An ONNX file of the graph, with the `stamp` as metadata."""
    exported = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    for node in exported.model.graph:
        node.metadata_props.clear()  # has paths of this machine
    exported.model.metadata_props.update(stamp(network))
    content: bytes = exported.model_proto.SerializeToString()
    return content


def reader(path: Path) -> Callable[[Tensor], Tensor]:
    """The function that an exported file computes: float32 images (N, C, H, W) from 0 to 1 to logits (N, classes)."""
    if path.suffix == ".safetensors":
        return load(path, "cpu").logits
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            # torch 2.9 makes the tensors from the bytes of the file, which nothing writes to
            warnings.filterwarnings("ignore", "The given buffer is not writable")
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
    """Float32 images (N, C, H, W) from 0 to 1, and their description: test images where the run's betons exist, else
    random ones."""
    with contextlib.suppress(data_prep.DataError):
        folder = network.config.data.folder
        manifest = data_prep.check(folder)
        if manifest.splits["test"].content_sha256 == network.content_sha256.get("test"):
            pixels = torch.from_numpy(data_prep.read_split(folder, "test")[0][:_IMAGES])
            return pixels.permute(0, 3, 1, 2) / 255, f"{len(pixels)} test images of {network.dataset}"
    height, width, channels = network.image_shape
    noise = torch.rand(_IMAGES, channels, height, width, generator=torch.Generator().manual_seed(0))
    return noise, f"{_IMAGES} images of random pixels, as the test images of {network.dataset} were not available"


def _logits(read: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([read(part) for part in torch.tensor_split(images, _PARTS) if len(part)])


def export(network: TrainedNetwork, out: Path, formats: list[str], run_dir: Path | None) -> list[str]:
    """Write the files and the model card into the folder `out`, and print a line for each file.

    formats: keys of EXPORTED. run_dir: of the run that trained the network, None where that is not known. Returns a
    sentence for each file that failed the comparison; these files are removed. Raises OSError, and UserError before
    anything is written.
    """
    results = Results.of(network, Run(run_dir) if run_dir else None)
    images, description = images_to_compare(network)
    expected = _logits(network.logits, images)
    largest = expected.abs().max().item()
    network = copy(network)  # the files must not have paths of this machine
    data = replace(network.config.data, dir="", source="")
    network.config = replace(network.config, data=data, record=RecordConfig())

    show(f"{'file':17}  {'bytes':>10}  largest difference  same answers")
    checks, failures = [], []
    program = cache(lambda: as_graph(network))
    contents: dict[str, Callable[[], bytes]] = {
        "safetensors": lambda: as_safetensors(network),
        "torch": lambda: as_torch(network, program()),
        "onnx": lambda: as_onnx(network, program()),
    }
    for name in formats:
        path = out / EXPORTED[name]
        with _quiet():
            content = contents[name]()
            write_atomic(path, content)
            logits = _logits(reader(path), images)
        difference = (logits - expected).abs().max().item()
        same = int((logits.argmax(1) == expected.argmax(1)).sum())
        show(f"{path.name:17}  {len(content):10,}  {difference:18.2g}  {same} of {len(images)}")
        if difference <= _TOLERANCE * largest:
            checks.append(Check(path.name, len(content), hashlib.sha256(content).hexdigest(), difference, same))
        else:
            path.unlink()
            failures.append(
                f"{path}: its logits differ by {difference:.2g} where they are up to {largest:.2g}, more than one in "
                f"{1 / _TOLERANCE:,.0f}; it is removed"
            )
    write_atomic(out / SETTINGS, config.to_toml(network.config).encode())
    write_atomic(out / PICTURES, Path(pictures.__file__).read_bytes())
    write_atomic(out / CARD, card(network, results, Checked(len(images), description, largest, checks)).encode())
    show(f"compared on {description}, with logits of up to {largest:.3g}; model card: {out / CARD}")
    return failures


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings, which are about torch and not about the network."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
