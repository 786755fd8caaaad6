"""All settings: the typed sections of a configuration, as data.

Checks that need more than the configuration are made by the modules that use a section."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class RecordConfig:
    """Where the curves go besides the run folder, and what the terminal shows."""

    wandb: Annotated[
        Literal["auto", "online", "offline", "disabled"],
        Field(
            description="W&B mode. auto: WANDB_MODE if set, else online when logged in, else offline. "
            "disabled: wandb is not even imported."
        ),
    ] = "auto"
    project: Annotated[str, Field(description="W&B project.")] = "dist_train"
    group: Annotated[str, Field(description="W&B group; runs of one comparison share it.")] = ""
    name: Annotated[str, Field(description="Name in W&B and in plot titles; empty: the run folder's.")] = ""
    tags: Annotated[list[str], Field(description="W&B tags.")] = field(default_factory=list)
    quiet: Annotated[bool, Field(description="No progress bar and no table on the terminal.")] = False
    artifacts: Annotated[
        Literal["none", "last", "all"], Field(description="Which checkpoints W&B keeps as artifacts.")
    ] = "none"
    system: Annotated[
        Literal["first", "all"],
        Field(description="Whose processor, memory and GPU W&B shows: rank 0's host by W&B itself, or every rank's."),
    ] = "first"
    digest_every: Annotated[
        int,
        Field(
            ge=0,
            description="Steps between two lines with digests of the weights; 0: at the end of each epoch only, "
            "which has one in any case.",
        ),
    ] = 0


# What a run may change when it goes on in its folder: none of it reaches the weights.
FREE = (
    "record",
    "checkpoint",
    "data.dir",
    "data.source",
    "data.loader",
    "train.device",
    "train.backend",
    "train.timeout",
    "train.log_every",
)


# What it may change at the price of bits: the next start in the folder says so.
DRIFTING = ("train.threads",)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """Everything a run's weights depend on, and how the run is recorded."""

    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)
