"""The block network: blocks B1..BK of mixed convolutions, then an output block O.

An intermediate block has L convolutions C1..CL with the same input x and outputs of one shape; it returns `a1*C1(x) +
... + aL*CL(x)` with `a = FC(m)`, where m holds the average of each channel of x and FC is one fully connected layer
with L units, or where a block says so L learned numbers for all images. O maps the channel averages of its input
through zero or more hidden layers to the logits. The architecture is given by the `[model]` section of the
configuration.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.settings import BatchNormConfig, Block, ModelConfig, Output
from dist_train.errors import NotFiniteError, UserError
from dist_train.model.mixing import Form, average, choose, exporting, gradient_needed, mix, weighted_sum
from dist_train.model.shapes import flops, padding_of, shapes, training_flops

_NO_VARIANCE = 1e-5  # of patches of normalised pixels: less than that of the rounding of pixels to 256 levels
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda x: x,
}


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015): by the microbatch's own statistics in training, in evaluation by
    `mean` and `var`, (channels,) float32.

    Training does not change `mean` and `var`: `dist_train.training.batch_norm` measures them on training images.
    Running averages would depend on the ranks, and lag behind the weights in short runs.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, config: BatchNormConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=config.scale)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, H, W)."""
        mean, var = (None, None) if self.training else (self.mean, self.var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, eps=self.eps)


class Mixing(nn.Module):
    """The coefficients `a = FC(m)` of a block: (N, C) channel averages of its input to (N, L) float32.

    Where they are not per image, FC is its bias alone."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        self.kind, self.temperature, self.per_image = block.coefficients, block.temperature, block.per_image
        branches = len(block.convolutions)
        # initial coefficients do not depend on the image; raw ones preserve the variance of L independent branches
        start = branches**-0.5 if self.kind == "raw" else 0.0
        if block.per_image:
            self.fc = nn.Linear(channels, branches)
            nn.init.zeros_(self.fc.weight)
            nn.init.constant_(self.fc.bias, start)
        else:
            self.bias = nn.Parameter(torch.full((branches,), start))

    def forward(self, averages: Tensor) -> Tensor:
        """averages: (N, C), of the weights' dtype; where coefficients are not per image, anything of N images. Returns
        the coefficients, (N, L), of the weights' dtype."""
        # an exported graph is run without autocast, so that it needs no context to disable it
        fp32 = nullcontext() if exporting() else torch.autocast(averages.device.type, enabled=False)
        with fp32:
            a: Tensor = self.fc(averages) if self.per_image else self.bias.repeat(averages.shape[0], 1)
            if self.kind == "softmax":
                return torch.softmax(a / self.temperature, 1)
            return torch.sigmoid(a) if self.kind == "sigmoid" else a


class MixedBlock(nn.Module):
    """One intermediate block: (N, C, H, W) to (N, channels, H', W')."""

    def __init__(self, channels: int, config: Block, batch_norm: BatchNormConfig) -> None:
        super().__init__()
        self.config = config
        self.mixing = Mixing(channels, config)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                channels,
                config.channels,
                conv.kernel,
                conv.stride,
                padding_of(conv),
                conv.dilation,
                conv.groups,
                conv.bias,
            )
            for conv in config.convolutions
        )
        norms = {"branch": len(self.convolutions), "post": 1, "none": 0}[config.norm]
        self.norms = nn.ModuleList(BatchNorm(config.channels, batch_norm) for _ in range(norms))
        self.activation = _ACTIVATIONS[config.activation]
        self.cast_kernels: list[Tensor] | None = None  # see BlockNetwork.kernels_cast
        self._forms: dict[tuple[torch.Size, str, bool], Form] = {}

    @property
    def branches(self) -> list[str]:
        """A short name for each convolution."""
        return [conv.name for conv in self.config.convolutions]

    @property
    def kernels(self) -> list[Tensor]:
        """The weights of the convolutions."""
        return [convolution.weight for convolution in self.convolutions if isinstance(convolution, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), floating-point. Returns (N, channels, H', W')."""
        config = self.config
        if config.per_image:
            averages, x = average(x, self.mixing.fc.weight.dtype)
            coefficients = self.mixing(averages)
        else:
            coefficients = self.mixing(x)
        if "branch" in (config.norm, config.activate):
            branches = []
            for position, convolution in enumerate(self.convolutions):
                branch = convolution(x)
                if config.norm == "branch":
                    branch = self.norms[position](branch)
                if config.activate == "branch":
                    branch = self.activation(branch)
                branches.append(branch)
            x = weighted_sum(coefficients, branches)
        else:
            x = mix(coefficients, x, [*self.convolutions], self._form(x), self.cast_kernels)
        if config.pool_at == "sum":
            x = self.pool(x)
        if config.norm == "post":
            x = self.norms[0](x)
        if config.activate == "post":
            x = self.activation(x)
        if config.pool_at == "end":
            x = self.pool(x)
        return F.dropout(x, config.dropout, self.training) if config.dropout else x

    def _form(self, x: Tensor) -> Form | None:
        """The form in which to mix for an input like x, chosen once; None while torch compiles or exports."""
        if torch.compiler.is_compiling() or exporting():
            return None
        key = x.shape, x.device.type, gradient_needed(x)
        if key not in self._forms:
            self._forms[key] = choose(x.shape, [*self.convolutions], *key[1:])
        return self._forms[key]

    def pool(self, x: Tensor) -> Tensor:
        """Pool (N, C, H, W) images as configured."""
        if self.config.pool == 1:
            return x
        if self.config.pool == "all":
            if self.config.pool_kind == "avg":
                return x.mean((2, 3), keepdim=True)
            # The gradient of amax compares x with its maximum, and compiled code computes x anew without rounding it to
            # bf16: none would be equal, and the gradient NaN. A pooling window keeps the position.
            compiled = torch.compiler.is_compiling() and not exporting()
            return F.max_pool2d(x, x.shape[2:]) if compiled else x.amax((2, 3), True)
        pool = F.max_pool2d if self.config.pool_kind == "max" else F.avg_pool2d
        return pool(x, self.config.pool)


class OutputBlock(nn.Module):
    """Channel averages, hidden layers and logits: (N, C, H, W) to (N, classes)."""

    def __init__(self, channels: int, classes: int, config: Output) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation = _ACTIVATIONS[config.activation]
        widths = [channels, *config.hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.logits = nn.Linear(widths[-1], classes, bias=config.bias)
        if config.init_std:
            nn.init.normal_(self.logits.weight, std=config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) if x.shape[2:].numel() > 1 else x.flatten(1)
        for layer in self.hidden:
            x = F.dropout(self.activation(layer(x)), self.dropout, self.training)
        logits: Tensor = self.logits(x)
        return logits


class BlockNetwork(nn.Module):
    """The whole network, in channels_last.

    image_shape: (C, H, W). classes: number of logits. Initial weights are drawn from torch's global generator on the
    CPU. Raises UserError for an architecture that cannot be built.
    """

    def __init__(self, config: ModelConfig, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        entry, *exits = shapes(config, image_shape)
        stem = config.stem
        self.config, self.channels, self.classes = config, image_shape[0], classes
        self.stem_activation = _ACTIVATIONS[stem.activation]
        self.stem = (
            nn.Conv2d(image_shape[0], entry[0], stem.kernel, stem.stride, stem.padding) if stem.kind != "none" else None
        )
        if self.stem is not None and stem.kind == "whiten":
            self.stem.weight.requires_grad_(False)
        channels = [shape[0] for shape in (entry, *exits)]
        self.blocks = nn.ModuleList(
            MixedBlock(c, block, config.batch_norm) for c, block in zip(channels, config.blocks, strict=False)
        )
        self.output = OutputBlock(channels[-1], classes, config.output)
        if config.init == "dirac":
            for module in self.blocks.modules():
                if isinstance(module, nn.Conv2d):
                    _dirac(module)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, stem_learns: bool = True) -> Tensor:
        """images: normalised (N, C, H, W) floats. stem_learns: False once the stem's rate stays 0, which saves the
        computation of its gradient. Returns the logits (N, classes)."""
        x = images
        if self.stem is not None:
            x = self.stem_activation(self.stem(x))
            if not stem_learns:
                x = x.detach()  # saves the gradient of B1's input
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(x)
        if self.stem is not None and not stem_learns:
            # DDP waits for a gradient of every parameter
            unused = [parameter for parameter in self.stem.parameters() if parameter.requires_grad]
            logits = _ZeroGradient.apply(logits, *unused)
        return logits

    def batch_mode(self) -> None:
        """Evaluation mode, but for the BatchNorms, which use the statistics of their batch."""
        self.eval()
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.train()

    @property
    def kernels(self) -> list[Tensor]:
        """The weights of the convolutions of all blocks."""
        return [kernel for block in self._mixed() for kernel in block.kernels]

    @contextmanager
    def kernels_cast(self, kernels: Sequence[Tensor]) -> Iterator[None]:
        """A context in which the blocks take `kernels`, those of the property `kernels` cast to the autocast's dtype,
        and so need not cast them in every forward pass. The weights must not change in it."""
        remaining = iter(kernels)
        for block in self._mixed():
            block.cast_kernels = [*itertools.islice(remaining, len(block.kernels))]
        try:
            yield
        finally:
            for block in self._mixed():
                block.cast_kernels = None

    def _mixed(self) -> list[MixedBlock]:
        return [block for block in self.blocks if isinstance(block, MixedBlock)]

    def training_flops(self, height: int, width: int, stem_learns: bool) -> int:
        """Floating-point operations of the forward and backward pass of one image of that size in pixels."""
        return training_flops(self.config, (self.channels, height, width), self.classes, stem_learns)

    def forward_flops(self, height: int, width: int) -> int:
        """Floating-point operations of the forward pass of one image of that size in pixels."""
        return sum(map(sum, flops(self.config, (self.channels, height, width), self.classes)))


class _ZeroGradient(torch.autograd.Function):
    """Its first argument, with a gradient of zero for the other ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (*grads, *map(torch.zeros_like, ctx.saved_tensors))


def _dirac(convolution: nn.Conv2d) -> None:
    """Initialise as many output channels as there are input channels to copies of these; the rest stay random. Grouped
    kernels are changed only where input and output channels are equal in number."""
    weight = convolution.weight.data
    if convolution.groups == 1:
        nn.init.dirac_(weight[: weight.shape[1]])
    elif weight.shape[0] == convolution.in_channels:
        nn.init.dirac_(weight, convolution.groups)


@torch.no_grad()
def whiten(stem: nn.Conv2d, images: Tensor, eps: float = 5e-4) -> None:
    """Set a `whiten` stem's kernels to the eigenvectors of the patches' covariance, scaled to unit variance,
    each with both signs (tysam-code/hlb-CIFAR10; Jordan 2024, "94% on CIFAR-10 in 3.29 seconds", 3.1).

    images: normalised (N, C, H, W) floats. eps: added to the eigenvalues. Computed in float64. Directions without
    variance, of which grey images have many, are replaced by those with it: their outputs would be rounding errors,
    amplified, and kernels of zeros would give constant channels, which no BatchNorm can normalise. Raises UserError for
    images without any variance.
    """
    kernel = stem.kernel_size[0]
    products = torch.zeros(len(stem.weight) // 2, len(stem.weight) // 2, dtype=torch.float64)
    count = 0
    for part in images.split(100):  # in parts, since all at once take ten times as long in page faults
        patches = F.unfold(part.double(), kernel)  # (N, values, patches)
        products += torch.bmm(patches, patches.transpose(1, 2)).sum(0)
        count += len(patches) * patches.shape[2]
    values, vectors = torch.linalg.eigh(products / count)
    (chosen,) = torch.nonzero(values > _NO_VARIANCE, as_tuple=True)
    if not len(chosen):
        raise UserError(
            "model.stem.kind = whiten: the training images are all of one colour, the same in each; check the images"
        )
    missing = len(values) - len(chosen)
    chosen = torch.cat((chosen.flip(0).repeat(missing)[:missing].sort().values, chosen))  # the strongest first
    filters = (vectors / (values + eps).sqrt())[:, chosen].T.reshape(-1, *stem.weight.shape[1:])
    stem.weight.copy_(torch.cat((filters, -filters)))


def check_finite(model: BlockNetwork) -> None:
    """Raises NotFiniteError, which names them, when weights or statistics of BatchNorms are not finite."""
    state = model.state_dict()
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
    if bad := [name for name, good in zip(state, finite, strict=True) if not good]:
        raise NotFiniteError(f"{len(bad)} of the network's {len(state)} tensors are not finite ({bad[0]} is the first)")


def parameter_kind(name: str, parameter: Tensor) -> str:
    """The optimizer's group of a BlockNetwork's parameter, by its name and shape: `stem`, `mixing`, `output`, `kernels`
    (of the blocks' convolutions) or `norms` (scales and biases)."""
    if name.startswith("stem."):
        return "stem"
    if name.startswith("output."):
        return "output"
    if ".mixing." in name:
        return "mixing"
    return "kernels" if parameter.ndim == 4 else "norms"


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """The first 16 hexadecimal digits of the SHA-256 of the bytes of each weight and BatchNorm statistic, by name."""
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest()[:16] for name, tensor in model.state_dict().items()}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 in hex of the names and bytes of all weights and BatchNorm statistics."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
