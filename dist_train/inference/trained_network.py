"""Loads and uses a trained network from a checkpoint, a run folder or an exported file:

    from dist_train import load

    network = load("runs/block94-seed0-1a2b3c4d")
    network.predict("cat.png")  # [[("cat", 0.98), ("dog", 0.01), ...]]
    network.logits(images)

where images are uint8 (N, H, W, C), or floats from 0 to 1 (N, C, H, W).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from dist_train.config.loading import parse, to_toml
from dist_train.config.settings import Config, Tta
from dist_train.data_prep.pictures import read_picture, unreadable
from dist_train.errors import NotFiniteError, UserError, reason, say
from dist_train.model.network import BlockNetwork, check_finite, weights_digest
from dist_train.model.tta import averaged
from dist_train.runs import checkpoint, layout
from dist_train.runs.checkpoint import REMEDY, Checkpoint, DataDescription, wrong
from dist_train.runs.environment import Environment

Pixels = npt.NDArray[Any] | Tensor
Picture = str | os.PathLike[str] | Image.Image | Pixels
_BATCH = 256  # images in one forward pass of predict
_DIVERGED = "its training diverged: use an earlier checkpoint, or train it with lower learning rates"


class TrainedNetwork(nn.Module):
    """A trained network with its normalisation and its classes. It computes in float32, deterministic on a CPU, unless
    it is moved to another dtype or used within torch.autocast.

    classes: their names, in the order of the logits. image_shape: (H, W, C) of the training images. dataset: the
    name of the data set. content_sha256: of the pixels and labels of each split, by its name. config: of the run. step:
    the number of training steps. environments: those that the run has had, in order. grey_bits: of the training
    images, as in `data_prep.pictures.read_picture`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: BlockNetwork, config: Config, data: DataDescription, step: int, environments: list[Environment]
    ) -> None:
        super().__init__()
        self.network, self.config, self.step, self.environments = network, config, step, environments
        self.dataset, self.classes, self.image_shape = data.dataset, data.classes, data.image_shape
        self.content_sha256, self.grey_bits = data.content_sha256, data.grey_bits
        for name, values in (("mean", data.mean), ("std", data.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Floats from 0 to 1, (N, C, H, W), to logits (N, classes). The input is not checked; gradients are
        computed."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    def logits(self, images: Pixels, tta: Tta = "none") -> Tensor:
        """The logits: (N, classes) float32, on the network's device.

        images: uint8 (N, H, W, C), or floats from 0 to 1 (N, C, H, W), of the size of `image_shape`; the network
        normalises them itself. tta: `mirror` averages over mirrored views, `shift` over shifted ones too. Raises
        ValueError for any other shape, dtype or range, and NotFiniteError for logits that are not finite.
        """
        return self._scores(self._normalised(images), tta)

    def predict(
        self, images: Picture | Sequence[Picture], top: int = 5, tta: Tta = "none"
    ) -> list[list[tuple[str, float]]]:
        """For each image the `top` likeliest classes and their probabilities, the likeliest first.

        images: one path, PIL image, array or tensor, or a sequence of them. Arrays and tensors are as `logits` takes
        them, may also be single images and, as uint8, grey (H, W) or of two or four channels, the last of them alpha.
        Images of another size than the network's are scaled until the shorter side fits, and cropped to their middle;
        transparent parts are white. Raises UserError for a file that cannot be read, ValueError as `logits` does.
        """
        if top < 1:
            raise ValueError(f"top = {top}: ask for 1 class at least")
        predictions: list[list[tuple[str, float]]] = []
        pictures = list(_separated(images))
        for start in range(0, len(pictures), _BATCH):
            batch = [self._normalised(self._prepared(picture)[None]) for picture in pictures[start : start + _BATCH]]
            best = self._scores(torch.cat(batch), tta).softmax(1).topk(min(top, len(self.classes)))
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            predictions += [[(self.classes[c], p) for c, p in zip(*row, strict=True)] for row in rows]
        return predictions

    def read(self, source: str | os.PathLike[str] | BinaryIO | Image.Image) -> npt.NDArray[np.uint8]:
        """One picture in the network's size, (H, W, C), as the training images were read. Raises UserError for one that
        cannot be read."""
        try:
            return read_picture(source, self.image_shape[0], self.grey_bits)
        except Exception as error:  # Pillow's decoders raise many types, among them SyntaxError
            name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", "an image")
            raise UserError(f"{name}: cannot be read ({unreadable(error)})") from error

    @torch.no_grad()
    def _scores(self, x: Tensor, tta: Tta) -> Tensor:
        if not len(x):
            return x.new_zeros(0, len(self.classes))
        scores = averaged(self.network, x, self.network(x).float(), tta)
        if bad := int((~scores.isfinite()).any(1).sum()):
            raise NotFiniteError(f"the logits of {bad} of {len(x)} images are not finite; {_DIVERGED}")
        return scores

    def _normalised(self, images: Pixels) -> Tensor:
        """(N, C, H, W) as the network takes it, on its device."""
        x = _tensor(images)
        height, width, channels = self.image_shape
        is_uint8 = x.dtype == torch.uint8
        expected = (height, width, channels) if is_uint8 else (channels, height, width)
        if x.shape[1:] != expected or not (is_uint8 or x.is_floating_point()):
            raise ValueError(
                f"images are {_described(x)}: this network takes uint8 (N, {height}, {width}, {channels}) or floats "
                f"from 0 to 1 (N, {channels}, {height}, {width}); predict takes any size"
            )
        if is_uint8:  # in the trainer's order of operations, for the same bits
            nchw = x.to(self.mean.device).permute(0, 3, 1, 2).to(self.mean.dtype)
            return nchw * (1 / (255 * self.std)) + -self.mean / self.std
        return (_checked(x).to(self.mean) - self.mean) / self.std

    def _prepared(self, picture: Picture) -> Tensor:
        """One picture in the network's size: (H, W, C) uint8, or (C, H, W) floats where these already have it."""
        size, _, channels = self.image_shape
        if isinstance(picture, np.ndarray | Tensor):
            x = _tensor(picture)
            if x.is_floating_point():
                if x.shape == (channels, size, size):
                    return x
                if x.ndim == 3 and len(x) == channels:
                    x = (_checked(x) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
            if x.dtype != torch.uint8 or not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (1, 2, 3, 4))):
                raise ValueError(
                    f"an image is {_described(x)}: give uint8 (H, W, {channels}), or floats from 0 to 1 "
                    f"({channels}, H, W)"
                )
            if x.shape == (size, size, channels):
                return x
            picture = Image.fromarray(x.cpu().numpy().squeeze(2) if x.shape[2:] == (1,) else x.cpu().numpy())
        return torch.from_numpy(self.read(picture))


def load(path: str | os.PathLike[str], device: Literal["auto", "cpu", "cuda"] = "auto") -> TrainedNetwork:
    """Read a trained network, ready for evaluation.

    path: a checkpoint, a run folder, of which the newest whole checkpoint is taken, or a `model.safetensors` that
    `dist-train export` wrote; verified by their SHA-256. device: `auto` takes a GPU where there is one. Nothing is
    written, and no code from the file is run. Raises UserError for a file that is missing, damaged or of another kind.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda: torch finds no GPU on this machine; use cpu, or auto")
    file = Path(path)
    if file.is_dir():
        file = _newest(file)
    elif not file.exists():
        raise UserError(f"{file}: there is no such file; {REMEDY}")
    elif layout.checksum_path(file).exists() and (why := wrong(file)):
        raise UserError(f"{file} {why}: it is damaged; name another checkpoint of the run, or a copy of it")
    contents, weights_sha256 = _read(file)
    return _built(contents, weights_sha256, file).to(device)


def predict(
    path: str | os.PathLike[str],
    images: Picture | Sequence[Picture],
    top: int = 5,
    tta: Tta = "none",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> list[list[tuple[str, float]]]:
    """`TrainedNetwork.predict` of a network that is loaded for this call: see there and `load`."""
    return load(path, device).predict(images, top, tta)


def _separated(images: Picture | Sequence[Picture]) -> Iterator[Picture]:
    if isinstance(images, str | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray | Tensor) and images.ndim < 4
    ):
        yield images
    else:
        yield from images


def _tensor(images: Pixels) -> Tensor:
    # copied, because torch rejects negative strides and warns of read-only arrays
    return images if isinstance(images, Tensor) else torch.from_numpy(np.array(images, order="C"))


def _checked(x: Tensor) -> Tensor:
    if x.numel() and not (x.min() > -1e-3 and x.max() < 1 + 1e-3):
        raise ValueError(
            f"images with values from {x.min():.3g} to {x.max():.3g}: give floats from 0 to 1, not normalised, or uint8"
        )
    return x


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def stamp(network: TrainedNetwork) -> dict[str, str]:
    """The metadata of an exported file, all that using the network requires besides the weights: strings by name."""
    return {
        "dataset": network.dataset,
        "classes": json.dumps(network.classes),
        "image_shape": json.dumps(network.image_shape),
        "mean": json.dumps(network.mean.flatten().tolist()),
        "std": json.dumps(network.std.flatten().tolist()),
        "content_sha256": json.dumps(network.content_sha256),
        "grey_bits": json.dumps(network.grey_bits),
        "step": json.dumps(network.step),
        "environments": json.dumps(network.environments),
        "weights_sha256": weights_digest(network.network),
        "config": to_toml(network.config),
    }


def _newest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run. Unlike `checkpoint.newest`, it does not rename damaged ones."""
    whole, damaged = checkpoint.newest_whole(layout.checkpoint_folder(run_dir))
    if whole is None:
        faults = "".join(f" ({path.name} {why})" for path, why in damaged[:1])
        raise UserError(f"{run_dir}: holds no whole checkpoint{faults}; {REMEDY}")
    for path, why in damaged:
        say(f"checkpoint {path} {why}; the one before it is used")
    return whole


def _read(path: Path) -> tuple[Checkpoint, str | None]:
    """The contents of a checkpoint or an exported file, and the expected SHA-256 of the weights, None where the file
    has none."""
    if path.suffix != ".safetensors":
        contents, weights_sha256 = checkpoint.read(path), None
    else:
        try:
            with safe_open(path, "pt") as file:
                model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                contents, weights_sha256 = _from_stamp(file.metadata() or {}, model)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}); {REMEDY}") from None
        except Exception:  # safetensors raises many types
            raise UserError(f"{path}: is damaged, or not a file of dist_train; {REMEDY}") from None
    if contents.config is None or contents.data is None:
        raise UserError(
            f"{path}: is of an earlier version, which did not save the configuration; train the network again"
        )
    return contents, weights_sha256


def _from_stamp(stamped: dict[str, str], model: dict[str, Tensor]) -> tuple[Checkpoint, str]:
    """A checkpoint, without the optimizers' state, from a `stamp` and the weights; and the expected SHA-256 of
    these."""
    data = {key: json.loads(stamped[key]) for key in ("classes", "image_shape", "mean", "std", "content_sha256")}
    data["grey_bits"] = json.loads(stamped.get("grey_bits", "null"))
    contents = Checkpoint.from_dict(
        {
            "step": json.loads(stamped["step"]),
            "model": model,
            "environments": json.loads(stamped["environments"]),
            "config": stamped["config"],
            "data": {"dataset": stamped["dataset"], **data},
        }
    )
    return contents, stamped["weights_sha256"]


def _built(contents: Checkpoint, weights_sha256: str | None, path: Path) -> TrainedNetwork:
    assert contents.config is not None
    assert contents.data is not None
    try:
        settings = parse(contents.config)
        height, width, channels = contents.data.image_shape
        shape, classes = (channels, height, width), len(contents.data.classes)
        with torch.device("meta"):  # takes no memory, whatever the configuration says
            expected = BlockNetwork(settings.model, shape, classes).state_dict()
        kinds = ({name: (t.shape, t.dtype) for name, t in each.items()} for each in (expected, contents.model))
        if next(kinds) != next(kinds):
            raise ValueError("its tensors are not those of its configuration")
        # the initial weights, which are replaced, must not change the caller's random state
        with torch.random.fork_rng(devices=[]):
            network = BlockNetwork(settings.model, shape, classes)
        network.load_state_dict(contents.model)
        trained = TrainedNetwork(network, settings, contents.data, contents.step, contents.environments)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{path}: does not fit this version of dist_train; use the one that it was trained with"
        ) from None
    if weights_sha256 not in (None, weights_digest(network)):
        raise UserError(f"{path}: its weights do not match their SHA-256: it is damaged; export it again")
    try:
        check_finite(network)
    except NotFiniteError as error:
        raise NotFiniteError(f"{path}: {error}; {_DIVERGED}") from None
    return trained.eval()
