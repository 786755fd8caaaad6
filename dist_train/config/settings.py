"""All settings: the typed sections of a configuration. `dist-train train --help` prints the docstring of each setting.

Checks that need more than the configuration are in the modules that use a section."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
# Every number has a range. The limits are far beyond what makes sense, and within what the numbers are used for:
# integers of 32 bits, images that a beton can hold (16 bits a side), timers, float32. Whether a network of such sizes
# fits into memory depends on the machine: model/shapes.py.
_Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(lambda number: number + 0.0)]  # -0.0 becomes 0.0
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, Field(ge=0, le=2**31 - 1)]
Pixels = Annotated[int, Field(ge=1, le=2**16 - 1)]
PixelsOrNone = Annotated[int, Field(ge=0, le=2**16 - 1)]
Channels = Annotated[int, Field(ge=1, le=2**16)]
Epochs = Annotated[_Finite, Field(gt=0, le=1e6)]
Rate = Annotated[_Finite, Field(ge=0, le=1e38)]
Fraction = Annotated[_Finite, Field(ge=0, lt=1)]
Part = Annotated[_Finite, Field(gt=0, le=1)]
PartOrNone = Annotated[_Finite, Field(ge=0, le=1)]
Activation = Literal["relu", "gelu", "silu", "identity"]
Where = Literal["branch", "post", "none"]
Tta = Literal["none", "mirror", "shift"]


class Effect(NamedTuple):
    """Marks, in its annotation, a setting or a section that a resumed run may change; others must stay the same.
    words: shown in the help. in_digest: whether the setting is part of the digest that names run folders."""

    words: str
    in_digest: bool


FREE = Effect("does not change the weights", in_digest=False)
DRIFTING = Effect("may change bits", in_digest=True)

# not in the digest: with `auto` runs on CPUs and GPUs have the same configuration
DEVICE = Effect("may change bits", in_digest=False)


@dataclass(frozen=True, config=_STRICT)
class Smaller:
    """A size of the training images in the first part of the run."""

    size: Pixels
    """Side of the images in pixels."""
    until: Part
    """Fraction of the run until which they have this size; rises from one size to the next."""
    how: Literal["crop", "scale"] = "crop"
    """`crop`: the middle of each image. `scale`: all of it, scaled down."""


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The data set, its split and the augmentation of training images."""

    dataset: Annotated[str, Field(min_length=1)] = "cifar10"
    """`cifar10`, `digits` or a name for images of your own."""
    dir: Annotated[str, FREE] = ""
    """Folder of the betons. Empty: data/DATASET."""
    source: Annotated[str, FREE] = ""
    """Folder that the betons are written from: images of your own, or CIFAR-10's official files. Empty: none."""
    image_size: PixelsOrNone = 0
    """Side of images of your own in pixels. 0: that of the betons."""
    drop_equal: Annotated[bool, FREE] = False
    """Drop training images that have the pixels of a test image, when the betons are written."""
    loader: Annotated[Literal["resident", "stream"], FREE] = "resident"
    """`resident` holds the data set in the device's memory, `stream` reads it from its file in every epoch."""
    holdout: CountOrNone = 0
    """Training images kept as a validation split, the same ones for every seed."""
    flip: Literal["none", "random", "alternate"] = "alternate"
    """Mirror training images: `none`; `random`; `alternate`, every other epoch, from a random start for each image
    (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds", 3.6)."""
    translate: PixelsOrNone = 2
    """Largest random shift of training images in pixels, the border reflected. 0: none."""
    cutout: PixelsOrNone = 0
    """Side in pixels of a square at a random place inside the image set to the training images' mean colour (DeVries
    and Taylor 2017). 0: none."""
    smaller: list[Smaller] = field(default_factory=list)
    """Sizes that training images have at first, after the other augmentations (progressive resizing, Howard 2018).
    Evaluation is at full size."""
    eval_batch: Count = 500
    """Images in one forward pass of an evaluation."""

    @property
    def folder(self) -> Path:
        """The folder of the betons."""
        return Path(self.dir or f"data/{self.dataset}")

    @property
    def source_folder(self) -> Path | None:
        """The folder that the betons are written from, None for none."""
        return Path(self.source) if self.source else None


@dataclass(frozen=True, config=_STRICT)
class Convolution:
    """One convolution C_l of a block."""

    kernel: Pixels = 3
    """Side of the kernel in pixels."""
    dilation: Pixels = 1
    """Distance in pixels between the points of the kernel."""
    groups: Channels = 1
    """Groups of channels that are convolved separately; divides the numbers of input and output channels."""
    stride: Pixels = 1
    """Pixels by which the kernel moves."""
    padding: PixelsOrNone | Literal["same"] = "same"
    """Zeros on each side in pixels. `same` keeps the image size when the stride is 1."""
    bias: bool = False
    """Learn a bias for each output channel."""

    @property
    def name(self) -> str:
        """A readable name: `3x3`, or `5x5 d2 g8 s2` with dilation 2, groups 8 and stride 2."""
        more = ((self.dilation, "d"), (self.groups, "g"), (self.stride, "s"))
        return " ".join([f"{self.kernel}x{self.kernel}", *(f"{letter}{n}" for n, letter in more if n > 1)])


@dataclass(frozen=True, config=_STRICT)
class Block:
    """An intermediate block: a1*C1(x) + ... + aL*CL(x), with coefficients a computed from the channel averages of x."""

    channels: Channels
    """Output channels of the block and of each of its convolutions."""
    convolutions: Annotated[list[Convolution], Field(min_length=1)]
    """C1 to CL, which all read x and give images of one size."""
    norm: Where = "post"
    """BatchNorm: in every `branch`, once after the sum (`post`) or `none`."""
    activate: Where = "post"
    """The activation, after the norm: in every `branch`, once after the sum (`post`) or `none`."""
    activation: Activation = "gelu"
    """`relu`, `gelu`, `silu` or `identity`."""
    coefficients: Literal["raw", "softmax", "sigmoid"] = "raw"
    """The coefficients a: `raw`, as the fully connected layer gives them; or its `softmax` or `sigmoid`."""
    temperature: Annotated[_Finite, Field(ge=1e-6, le=1e6)] = 1.0
    """Of `softmax`: the higher, the more even are the coefficients."""
    per_image: bool = True
    """Compute the coefficients of each image from its channel averages. false: learn L numbers, the same ones for all
    images, in place of the fully connected layer."""
    pool: Pixels | Literal["all"] = 1
    """Side in pixels of the pooling windows, which do not overlap. 1: none. `all`: the whole image, to one pixel."""
    pool_kind: Literal["max", "avg"] = "max"
    """`max` or `avg` pooling."""
    pool_at: Literal["sum", "end"] = "end"
    """Pooling right after the `sum`, which is less work, or at the `end`, after norm and activation."""
    dropout: Fraction = 0.0
    """Probability with which each output is set to 0 in training."""


@dataclass(frozen=True, config=_STRICT)
class Stem:
    """The layer before the first block."""

    kind: Literal["none", "conv", "whiten"] = "none"
    """`none`; `conv`, a learned convolution; or `whiten`, fixed kernels that decorrelate the training set's patches,
    with a learned bias (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds", 3.1)."""
    kernel: Pixels = 2
    """Side of the kernel in pixels."""
    stride: Pixels = 1
    """Pixels by which the kernel moves."""
    padding: PixelsOrNone = 0
    """Zeros on each side in pixels."""
    channels: Channels = 24
    """Output channels of `conv`; `whiten` has 2 * 3 * kernel^2."""
    activation: Activation = "gelu"
    """`relu`, `gelu`, `silu` or `identity`."""


@dataclass(frozen=True, config=_STRICT)
class Output:
    """The output block: channel averages, hidden layers, and one linear layer to the logits."""

    hidden: list[Channels] = field(default_factory=list)
    """Widths of the hidden layers."""
    activation: Activation = "relu"
    """After each hidden layer: `relu`, `gelu`, `silu` or `identity`."""
    dropout: Fraction = 0.0
    """Probability with which each output of a hidden layer is set to 0 in training."""
    bias: bool = True
    """Learn a bias for each logit."""
    init_std: Annotated[_Finite, Field(ge=0, le=1e3)] = 0.0
    """Standard deviation of the last layer's initial weights. 0: torch's default initialisation."""


@dataclass(frozen=True, config=_STRICT)
class BatchNormConfig:
    """The BatchNorms of all blocks."""

    eps: Annotated[_Finite, Field(ge=1e-20, le=1)] = 1e-5
    """Added to the variance."""
    scale: bool = True
    """Learn a factor for each channel, besides its bias."""


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The architecture: a stem, the blocks B1 to BK, and an output block."""

    blocks: Annotated[list[Block], Field(min_length=1)]
    """B1 to BK, in order."""
    stem: Stem = field(default_factory=Stem)
    output: Output = field(default_factory=Output)
    batch_norm: BatchNormConfig = field(default_factory=BatchNormConfig)
    init: Literal["dirac", "default"] = "default"
    """Initial kernels of the blocks: `dirac`, the identity where they can be; `default`, torch's."""


@dataclass(frozen=True, config=_STRICT)
class Group:
    """The optimizer of one group of parameters."""

    algorithm: Literal["sgd", "adamw", "muon"] | None = None
    """`sgd`, with Nesterov momentum; `adamw`; or `muon`, for kernels (Jordan et al. 2024, "Muon: an optimizer for
    hidden layers in neural networks")."""
    lr: Rate | None = None
    """Peak learning rate, for the loss averaged over the images that a step is trained on."""
    momentum: Fraction | None = None
    """Momentum of `sgd` and `muon`, beta1 of `adamw`; below 1."""
    weight_decay: Rate | None = None
    """As torch's `sgd` and `adamw` define it; `muon` has none."""
    until: PartOrNone | None = None
    """Fraction of the run at which the schedule of this group ends. Its rate is 0 afterwards."""


@dataclass(frozen=True, config=_STRICT)
class OptimConfig:
    """A group for each kind of parameters, and the schedule that scales every learning rate over the run."""

    default: Group = field(default_factory=Group)
    """Defaults of the other groups."""
    kernels: Group = field(default_factory=Group)
    """Kernels of the blocks' convolutions."""
    norms: Group = field(default_factory=Group)
    """Scales and biases of the BatchNorms, and biases of the blocks' convolutions."""
    mixing: Group = field(default_factory=Group)
    """The fully connected layers that compute the blocks' coefficients."""
    output: Group = field(default_factory=Group)
    """The output block."""
    stem: Group = field(default_factory=Group)
    """The stem; of a whitening stem the bias."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """After the warm-up: `linear` or `cosine` fall to 0 at the end of the run, or `constant`."""
    warmup: Fraction = 0.0
    """Fraction of the run in which the rates rise linearly from 0; below 1."""

    def group(self, kind: str) -> dict[str, Any]:
        """The settings of the group `kind`, with those of the default group where it sets none."""
        settings: dict[str, Any] = {
            "algorithm": "adamw",
            "lr": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "until": 1.0,
        }
        for group in (self.default, getattr(self, kind)):
            given = dataclasses.asdict(group)
            settings.update({name: value for name, value in given.items() if value is not None})
        return settings


@dataclass(frozen=True, config=_STRICT)
class Select:
    """Training on the hardest images of each microbatch alone, those of the highest losses. Loss and accuracy in
    training are then of these images (as in Jordan 2024, airbench96)."""

    fraction: Part = 1.0
    """Part of each microbatch that is kept. 1: all, without the pass that chooses."""
    start: Fraction = 0.0
    """Fraction of the run from which images are chosen. Until then all are trained on."""
    until: Part = 1.0
    """Fraction of the run until which images are chosen."""
    losses: Literal["now", "last"] = "now"
    """The losses that choose: `now`, those of a forward pass with the weights as they are; or `last`, those of the last
    step that trained on each image, which need no pass and one exchange between the ranks an epoch."""
    size: PixelsOrNone = 0
    """Side in pixels that larger images are scaled to for the pass that chooses. 0: none are."""

    def active(self, step: int, total_steps: int) -> bool:
        """Whether images are chosen in the step after `step` finished ones of a run."""
        return self.fraction < 1 and steps_in(self.start, total_steps) <= step < steps_in(self.until, total_steps)

    def kept(self, images: int) -> int:
        """The number of a microbatch's images that are kept: the nearest to the fraction, at least one."""
        return max(1, round(self.fraction * images))

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in the pass that chooses. height, width: in training."""
        return (self.size, self.size) if 0 < self.size < min(height, width) else (height, width)

    @property
    def words(self) -> str:
        """Which images are trained on, such as `the hardest 50 % of each microbatch, from 60 to 100 % of the run`; ""
        for all."""
        if self.fraction == 1:
            return ""
        by = ", by their last losses" if self.losses == "last" else ""
        when = f", from {100 * self.start:g} to {100 * self.until:g} % of the run"
        when = when if self.until - self.start < 1 else ""
        return f"the hardest {100 * self.fraction:g} % of each microbatch{by}{when}"


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """The length of the run, its batches, and the arithmetic and devices of its ranks."""

    epochs: Epochs = 10
    """Length of the run in epochs; may be a fraction. All that changes during a run, such as learning rates and image
    sizes, is in fractions of it: a shorter run goes through the same changes."""
    batch_size: Count = 2000
    """Images in a global batch, that is in a step of all ranks together; a multiple of the microbatches."""
    microbatches: Annotated[int, Field(ge=1, le=2**16)] = 8
    """Fixed parts of a global batch, spread over the ranks. Any number of ranks up to it gives the same weights."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    """Seed of the initial weights, the order of images, augmentation and dropout."""
    label_smoothing: Fraction = 0.0
    """Part of each label that is spread over all classes; below 1."""
    select: Select = field(default_factory=Select)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """`bf16` or `fp16` autocast, with weights in fp32; or `fp32` throughout."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cuda_graphs: Annotated[bool, FREE] = True
    """On a GPU record the kernels of a microbatch once, as CUDA graphs, and replay them: the same bits in a fraction of
    the time. Takes the memory of up to four microbatches at a time."""
    deterministic: bool = True
    """Deterministic kernels, and fixed choices of cuDNN and cuBLAS, as bit-identity requires. TF32 is always off."""
    threads: Annotated[int, Field(ge=1, le=1024), DRIFTING] = 1
    """CPU threads of a rank."""
    device: Annotated[Literal["auto", "cpu", "cuda"], DEVICE] = "auto"
    """`cpu`; `cuda`; or `auto`, the GPU if there is one. CPUs and GPUs round differently."""
    backend: Annotated[Literal["auto", "nccl", "gloo"], FREE] = "auto"
    """Communication between ranks. `auto`: `nccl` between GPUs, `gloo` between CPUs. With `gloo` ranks can
    share a GPU."""
    timeout: Annotated[int, Field(ge=1, le=7 * 24 * 3600), FREE] = 600
    """Seconds to wait in an exchange for a rank that lives before it counts as lost, up to a week."""
    log_every: Annotated[CountOrNone, FREE] = 0
    """Steps between two exchanges of losses and stop signals between the ranks. 0: 1 on a CPU, 20 on a GPU."""


def steps_in(part: float, total_steps: int) -> int:
    """The steps in a part of a run, a fraction of it: the nearest whole number."""
    return round(part * total_steps)


@dataclass(frozen=True, config=_STRICT)
class EvaluateConfig:
    """When and how the network is evaluated."""

    tta: Tta = "none"
    """Test-time augmentation of the last evaluation, in addition to the one without: `none`; `mirror`, the average
    of the logits of an image and its mirror image; or `shift`, the same of the image (half of the weight) and of it
    shifted by one pixel up and left, and down and right (a quarter each; Jordan 2024, "94% on CIFAR-10 in 3.29
    seconds", 3.5)."""
    every: Count = 1
    """Epochs between two evaluations; there is one at the end in any case."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """When checkpoints are written, besides the one at the end, and how many are kept."""

    every_epochs: Count = 1
    """Epochs between two checkpoints."""
    every_steps: CountOrNone = 0
    """Steps between two further checkpoints. 0: none."""
    keep: Count = 2
    """Number of the newest checkpoints that are kept."""


@dataclass(frozen=True, config=_STRICT)
class RecordConfig:
    """Where the metrics go besides the run folder, and what the terminal shows."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mode of W&B: `online`, `offline` or `disabled`, where wandb is not even imported. `auto`: WANDB_MODE if set, else
    online when logged in, else offline. WANDB_DISABLED=true is the same as WANDB_MODE=disabled."""
    project: str = ""
    """W&B project. Empty: WANDB_PROJECT if set, else dist_train."""
    group: str = ""
    """W&B group, which runs of one comparison share. Empty: none, or that of the environment."""
    name: str = ""
    """Name in W&B and in titles of plots. Empty: that of the run folder; in W&B, WANDB_NAME if set."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    quiet: bool = False
    """No progress bar and no table in the terminal."""
    artifacts: Literal["none", "last", "all"] = "none"
    """Checkpoints that W&B keeps as artifacts: `none`, the `last` or `all`."""
    share: Literal["all", "metrics"] = "all"
    """What W&B gets: `all`; or `metrics`, without the machine (host name, paths, git remote, packages) and without test
    images."""
    system: Literal["first", "all"] = "first"
    """System metrics that W&B shows: those of the `first` rank's host, sampled by W&B, or of `all` ranks, each
    sampled by itself."""
    digest_every: CountOrNone = 0
    """Steps between two digests of the weights in metrics.jsonl, besides those at the end of each epoch. 0: none."""


@dataclass(frozen=True, config=_STRICT)
class Config:
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: Annotated[CheckpointConfig, FREE] = field(default_factory=CheckpointConfig)
    record: Annotated[RecordConfig, FREE] = field(default_factory=RecordConfig)
