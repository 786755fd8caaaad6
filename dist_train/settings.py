"""The sections of the configuration, and what can be checked of them before torch is imported, which takes seconds.

Each section is described here and used by the module that it is named after: `[data]` by data.py, `[model]` by
model.py, and so on; `[record]` is in record.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dist_train import data_prep
from dist_train.errors import UserError

_STRICT = ConfigDict(extra="forbid", strict=True)
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Activation = Literal["relu", "gelu", "silu", "identity"]
Where = Literal["branch", "post", "none"]
Tta = Literal["none", "mirror", "shift"]
# data_prep's messages name its own options; the trainer has settings in their place
_SETTINGS = {
    "--dataset digits": "--preset digits",
    "--dataset": "data.dataset",
    "--image-size": "data.image_size",
    "--out": "data.dir",
    "--source": "data.source",
}


@dataclass(frozen=True, config=_STRICT)
class Smaller:
    """Train on images of `size` x `size` pixels until that epoch, which may be a fraction: the middle of each
    image (`crop`), or all of it scaled down (`scale`)."""

    size: Annotated[int, Field(gt=0)]
    until_epoch: Annotated[float, Field(gt=0)]
    how: Literal["crop", "scale"] = "crop"


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """dataset: cifar10, digits, or a name for one's own images. dir: folder of the betons, `data/DATASET` when empty.
    source: folder that the betons are written from, of one's own images or with CIFAR-10's official files. image_size:
    side of one's own images in pixels; 0 takes the betons'. holdout: training images kept as a validation split. flip:
    mirror images never, at random, or every other epoch starting at random per image (Jordan 2024, "94% on CIFAR-10 in
    3.29 seconds", 3.6). translate: largest shift in pixels, the border reflected. cutout: side of the square set to the
    mean. smaller: sizes that training images have at first, after the other augmentations (progressive resizing, Howard
    2018); evaluation is at full size. eval_batch: images in one forward pass of evaluation."""

    dataset: Annotated[str, Field(min_length=1)] = "cifar10"
    dir: str = ""
    source: str = ""
    image_size: NonNegative = 0
    loader: Literal["resident", "stream"] = "resident"
    holdout: NonNegative = 0
    flip: Literal["none", "random", "alternate"] = "alternate"
    translate: NonNegative = 2
    cutout: NonNegative = 0
    smaller: list[Smaller] = field(default_factory=list)
    eval_batch: Annotated[int, Field(gt=0)] = 500

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"data/{self.dataset}")

    @property
    def source_folder(self) -> Path | None:
        return Path(self.source) if self.source else None

    @property
    def written(self) -> bool:
        """Whether the betons are there, in whatever state: their folder appears whole."""
        try:
            return (self.folder / data_prep.MANIFEST).exists()
        except OSError:  # which preparing them will say
            return False

    def check(self) -> None:
        """Raise UserError for a data set that is neither there nor can be written."""
        empty = self._empty()
        if self.dataset in data_prep.DATASETS:
            if self.image_size:
                raise UserError(
                    f"data.image_size = {self.image_size}: {self.dataset} has images of a size of its own; leave it "
                    f"out, or give images of your own another name with data.dataset"
                )
        elif empty:
            if not self.source:
                raise UserError(
                    f"data.dataset = {self.dataset}: there is no such data set; choose one of "
                    f"{', '.join(data_prep.DATASETS)}, or set data.source to a folder of images of your own"
                )
            if not self.image_size:
                raise UserError(
                    f"data.image_size = 0: the images of {self.dataset} need a size; set the side in pixels, such as 64"
                )

    def prepare(self) -> data_prep.Manifest:
        """Check the betons, writing them first where the folder is missing or empty, and return their manifest. One of
        all processes that do this at once writes, and the others wait. Raises UserError, or data_prep.DataError."""
        if not self._empty():
            return manifest(self)
        self.check()
        try:
            return data_prep.prepare(self.dataset, self.folder, self.source_folder, image_size=self.image_size)
        except data_prep.DataError as error:
            said, run, command = str(error).partition("python -m ")
            for option, setting in _SETTINGS.items():
                said = re.sub(rf"(?<![\w-]){option}(?![\w-])", setting, said)
            raise type(error)(said + run + command) from error

    def _empty(self) -> bool:
        try:
            return not any(self.folder.iterdir())
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            raise UserError(f"data.dir = {self.folder} is a file, or lies in one; name a folder") from None
        except OSError as error:
            raise UserError(
                f"data.dir = {self.folder}: cannot be read ({error.strerror}); name another folder, or mend its rights"
            ) from None


def manifest(config: DataConfig) -> data_prep.Manifest:
    """Check the betons and return their manifest. Raises UserError or data_prep.DataError."""
    config.check()
    write = data_prep.command(config.dataset, config.folder, config.source_folder, config.image_size)
    if config._empty():
        raise UserError(f"data.dir = {config.folder}: there is no data set; write it with {write}")
    found = data_prep.check(config.folder, write)
    if found.dataset != config.dataset:
        raise UserError(
            f"data.dir = {config.folder} holds {found.dataset}, but data.dataset = {config.dataset}; "
            f"name the right folder or data set"
        )
    if not data_prep.same_source(found, config.source_folder):
        raise UserError(
            f"data.dir = {config.folder} holds the images of {found.source}, but data.source = {config.source}; give "
            f"these another data.dataset, or leave data.source out"
        )
    height, width, _ = found.image_shape
    if config.image_size and (height, width) != (config.image_size, config.image_size):
        other = config.folder.with_name(f"{config.dataset}-{config.image_size}")
        write = data_prep.command(config.dataset, other, config.source_folder, config.image_size)
        raise UserError(
            f"data.dir = {config.folder} holds images of {width}x{height} pixels, but data.image_size = "
            f"{config.image_size}; set data.dir={other} and write that with {write}"
        )
    return found


def check_images(config: DataConfig, manifest: data_prep.Manifest, batch_size: int) -> None:
    """Raises UserError when the images are too small for the settings, or the training set for a batch."""
    ends = [smaller.until_epoch for smaller in config.smaller]
    if ends != sorted(set(ends)):
        raise UserError(f"data.smaller: until_epoch must rise from one size to the next, not {ends}; sort them")
    if too_large := [s.size for s in config.smaller if s.size > min(manifest.image_shape[:2])]:
        raise UserError(
            f"data.smaller: size = {too_large[0]} is larger than the images of {manifest.dataset} "
            f"({manifest.image_shape[0]}x{manifest.image_shape[1]} pixels); make it smaller"
        )
    if config.translate >= min(manifest.image_shape[:2]):
        raise UserError(
            f"data.translate = {config.translate} shifts images of {manifest.image_shape[1]}x"
            f"{manifest.image_shape[0]} pixels out of sight; use {min(manifest.image_shape[:2]) - 1} at most"
        )
    count = manifest.splits["train"].count
    if config.holdout + batch_size > count:
        raise UserError(
            f"data.holdout = {config.holdout} and train.batch_size = {batch_size} need more than the "
            f"{count} training images of {manifest.dataset}; lower one of them"
        )


@dataclass(frozen=True, config=_STRICT)
class Convolution:
    """One convolution C_l of a block. `padding = "same"` keeps the image size when the stride is 1."""

    kernel: Positive = 3
    dilation: Positive = 1
    groups: Positive = 1
    stride: Positive = 1
    padding: Annotated[int, Field(ge=0)] | Literal["same"] = "same"
    bias: bool = False

    @property
    def name(self) -> str:
        """For people, such as `3x3`, or `5x5 d2 g8 s2` with another dilation, groups or stride than 1."""
        others = ((self.dilation, "d"), (self.groups, "g"), (self.stride, "s"))
        return " ".join([f"{self.kernel}x{self.kernel}", *(f"{letter}{n}" for n, letter in others if n > 1)])


@dataclass(frozen=True, config=_STRICT)
class Block:
    """An intermediate block. Norm, then activation, sit in every branch (`branch`) or once after the sum
    (`post`); pooling comes right after the sum (`sum`) or after norm and activation (`end`). pool = "all" takes
    the whole image, of any size, to one pixel."""

    channels: Positive
    convolutions: Annotated[list[Convolution], Field(min_length=1)]
    norm: Where = "post"
    activate: Where = "post"
    activation: Activation = "gelu"
    coefficients: Literal["raw", "softmax", "sigmoid"] = "raw"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    pool: Positive | Literal["all"] = 1
    pool_kind: Literal["max", "avg"] = "max"
    pool_at: Literal["sum", "end"] = "end"
    dropout: Probability = 0.0


@dataclass(frozen=True, config=_STRICT)
class Stem:
    """What precedes B1: `none`; `conv`, a learned convolution with `channels` outputs; or `whiten`, fixed
    kernels that decorrelate the training set's patches (2 * 3 * kernel^2 channels) with a learned bias."""

    kind: Literal["none", "conv", "whiten"] = "none"
    kernel: Positive = 2
    stride: Positive = 1
    padding: Annotated[int, Field(ge=0)] = 0
    channels: Positive = 24
    activation: Activation = "gelu"


@dataclass(frozen=True, config=_STRICT)
class Output:
    """The output block O: the widths of its hidden layers, then one linear layer to the logits.

    init_std: standard deviation of the last layer's initial weights; 0 takes torch's default."""

    hidden: list[Positive] = Field(default_factory=list)
    activation: Activation = "relu"
    dropout: Probability = 0.0
    bias: bool = True
    init_std: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True, config=_STRICT)
class BatchNormConfig:
    """momentum: weight of the newest batch in the running statistics. scale: learn a factor per channel."""

    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    eps: Annotated[float, Field(gt=0)] = 1e-5
    scale: bool = True


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The architecture. init: `dirac` starts kernels as the identity where they can be, `default` is torch's."""

    blocks: Annotated[list[Block], Field(min_length=1)]
    stem: Stem = Field(default_factory=Stem)
    output: Output = Field(default_factory=Output)
    batch_norm: BatchNormConfig = Field(default_factory=BatchNormConfig)
    init: Literal["dirac", "default"] = "default"


def convolved(size: int, kernel: int, dilation: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def padding_of(conv: Convolution, where: str) -> int:
    if conv.padding != "same":
        return conv.padding
    reach = conv.dilation * (conv.kernel - 1)
    if reach % 2:
        raise UserError(
            f'{where}: padding = "same" needs an odd kernel or an even dilation, but kernel = {conv.kernel} '
            f"with dilation = {conv.dilation}; give the padding as a number"
        )
    return reach // 2


def shapes(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Check an architecture on paper.

    image_shape: (C, H, W) of the input. Returns the (C, H, W) of the images that enter B1, and that leave
    B1..BK. Raises UserError, naming block and convolution, for an architecture that cannot be built.
    """
    channels, height, width = image_shape
    stem = config.stem
    if stem.kind != "none":
        channels = 2 * channels * stem.kernel**2 if stem.kind == "whiten" else stem.channels
        height = convolved(height, stem.kernel, 1, stem.stride, stem.padding)
        width = convolved(width, stem.kernel, 1, stem.stride, stem.padding)
        if min(height, width) < 1:
            raise UserError(
                f"model.stem: kernel = {stem.kernel} leaves nothing of an image of "
                f"{image_shape[1]}x{image_shape[2]} pixels; make it smaller"
            )
    found = [(channels, height, width)]
    for number, block in enumerate(config.blocks, 1):
        sizes: list[tuple[int, ...]] = []
        for position, conv in enumerate(block.convolutions, 1):
            where = f"model.blocks: block {number}, convolution {position}"
            for name, count in (("input", channels), ("output", block.channels)):
                if count % conv.groups:
                    raise UserError(
                        f"{where}: groups = {conv.groups} does not divide its {count} {name} channels; "
                        f"choose a divisor of {math.gcd(channels, block.channels)}"
                    )
            pad = padding_of(conv, where)
            size = tuple(convolved(n, conv.kernel, conv.dilation, conv.stride, pad) for n in (height, width))
            if min(size) < 1:
                raise UserError(
                    f"{where}: kernel = {conv.kernel} with dilation = {conv.dilation} and padding = {pad} leaves "
                    f"nothing of an image of {height}x{width} pixels; make it smaller or pad more"
                )
            if sizes and size != sizes[0]:
                raise UserError(
                    f"{where} gives images of {size[0]}x{size[1]} pixels where convolution 1 gives "
                    f"{sizes[0][0]}x{sizes[0][1]}; change its kernel, dilation, stride or padding"
                )
            sizes.append(size)
        height, width = (1, 1) if block.pool == "all" else (n // block.pool for n in sizes[0])
        if min(height, width) < 1:
            raise UserError(
                f"model.blocks: block {number}: pool = {block.pool} leaves nothing of an image of "
                f"{sizes[0][0]}x{sizes[0][1]} pixels; make it smaller"
            )
        channels = block.channels
        found.append((channels, height, width))
    return found


def summed(block: Block, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The (C, H, W) of the images that a block sums, and only then pools, from that of its input."""
    conv, (_, height, width) = block.convolutions[0], shape
    how = conv.kernel, conv.dilation, conv.stride, padding_of(conv, "")
    return block.channels, convolved(height, *how), convolved(width, *how)


@dataclass(frozen=True, config=_STRICT)
class Group:
    """How one kind of parameters is updated, likewise in `kernels`, `norms`, `mixing`, `output` and `stem`; what is
    not given there is taken from `[optim.default]`.

    lr is the peak rate for the loss averaged over the global batch. weight_decay has torch's meaning for the
    algorithm. until_epoch: when set, this kind's rate follows the schedule up to that epoch and is 0 after.
    """

    algorithm: Literal["sgd", "adamw", "muon"] | None = None
    lr: Rate | None = None
    momentum: Momentum | None = None
    weight_decay: Rate | None = None
    until_epoch: Rate | None = None


@dataclass(frozen=True, config=_STRICT)
class OptimConfig:
    """One group for each kind of parameters, and the schedule that scales every rate over the run."""

    default: Group = dataclasses.field(default_factory=Group)
    kernels: Group = dataclasses.field(default_factory=Group)
    norms: Group = dataclasses.field(default_factory=Group)
    mixing: Group = dataclasses.field(default_factory=Group)
    output: Group = dataclasses.field(default_factory=Group)
    stem: Group = dataclasses.field(default_factory=Group)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def group(self, kind: str) -> dict[str, Any]:
        """The settings of one kind of parameters, resolved."""
        settings: dict[str, Any] = {
            "algorithm": "adamw",
            "lr": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "until_epoch": None,
        }
        for group in (self.default, getattr(self, kind)):
            given = dataclasses.asdict(group)
            settings.update({name: value for name, value in given.items() if value is not None})
        return settings


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """epochs: may be a fraction. microbatches: the fixed parts of a global batch, spread over the ranks; any world
    size up to it gives the same weights. deterministic: all that bit-identity needs of the device: deterministic
    kernels and fixed choices of cuDNN and cuBLAS (TF32 is off in any case). threads: CPU threads of a rank; they
    are part of what the weights depend on. backend: NCCL between GPUs and gloo between CPUs, unless given; with
    gloo ranks can share a GPU. timeout: seconds after which a rank that is waited for counts as lost. log_every:
    steps whose losses are fetched from the device, and after which stop signals are obeyed, at once; 0 takes 1 on a
    CPU and 20 on a GPU."""

    epochs: Annotated[float, Field(gt=0)] = 10
    batch_size: Positive = 2000
    microbatches: Positive = 8
    seed: int = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    compile: bool = False
    deterministic: bool = True
    threads: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    timeout: Positive = 600
    log_every: Annotated[int, Field(ge=0)] = 0


def check_batch(batch_size: int, microbatches: int) -> None:
    """Raises UserError when a batch does not split into equal parts."""
    if batch_size % microbatches:
        raise UserError(
            f"train.batch_size = {batch_size} does not split into train.microbatches = {microbatches} "
            f"equal parts; use {batch_size // microbatches * microbatches or microbatches}"
        )


@dataclass(frozen=True, config=_STRICT)
class EvaluateConfig:
    """tta: test-time augmentation of the last evaluation, whose figures come beside those without it. `mirror`
    averages the logits of an image and its mirror image; `shift` does so for the image (half of the weight) and for
    it shifted by one pixel up and left and down and right (a quarter each; Jordan 2024, "94% on CIFAR-10 in 3.29
    seconds", 3.5). every: epochs from one evaluation to the next; the last epoch has one in any case."""

    tta: Tta = "none"
    every: Annotated[int, Field(gt=0)] = 1


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """A checkpoint is written every `every_epochs` epochs, every `every_steps` steps when that is not 0, and at the
    end; the newest `keep` stay."""

    every_epochs: Positive = 1
    every_steps: Annotated[int, Field(ge=0)] = 0
    keep: Positive = 2

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether one is due after `step` steps."""
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        return by_steps or step % (self.every_epochs * steps_per_epoch) == 0
