"""The optimizers and their learning rate schedule. Every rank applies the same update to the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.settings import OptimConfig, steps_in
from dist_train.model.network import parameter_kind
from dist_train.training.cuda_graphs import Replayed


def factor(config: OptimConfig, progress: float) -> float:
    """The schedule: the factor in 0..1 on every learning rate. progress: fraction of the run that is finished.

    The factor rises linearly from 0 over the first `warmup` of the run, then follows `config.schedule`."""
    if progress >= 1:
        return 0.0
    if progress < config.warmup:
        return progress / config.warmup
    rest = (progress - config.warmup) / (1 - config.warmup)
    return {"linear": 1 - rest, "cosine": 0.5 + 0.5 * math.cos(math.pi * rest), "constant": 1.0}[config.schedule]


def orthogonalise(matrices: Tensor, iterations: int = 3) -> Tensor:
    """Bring every singular value near 1 by the quintic Newton-Schulz iteration in bfloat16 (Jordan et al. 2024,
    "Muon: an optimizer for hidden layers in neural networks").

    matrices: (batch, rows, columns), of a Frobenius norm of at most 1 each. Returns the same shape, bfloat16.
    """
    x: Tensor = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for convolution kernels of fixed norm.

    Before each update a kernel (out, in, h, w) is scaled to the norm sqrt(out) (Jordan 2024, airbench94_muon):
    batch normalisation makes the kernel's own scale irrelevant, and a learning rate then means the same in every
    layer. Kernels of one shape are orthogonalised together, since a step of a GPU is bound by the number of operations.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, cuda_graphs: bool = False) -> None:
        """cuda_graphs: replay the orthogonalisation of parameters on a GPU, two thirds of a step's operations."""
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.orthogonalise = Replayed(_orthogonalised) if cuda_graphs else _orthogonalised

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # kernels of one shape side by side
            kernels = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            if not kernels or not group["lr"]:
                continue
            for kernel in kernels:
                if not self.state[kernel]:
                    self.state[kernel]["momentum"] = torch.zeros_like(kernel)
            momenta = [self.state[kernel]["momentum"] for kernel in kernels]
            gradients = [kernel.grad for kernel in kernels]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            nesterov = list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))
            updates = self.orthogonalise(nesterov)
            norms = torch._foreach_norm(kernels)
            torch._foreach_div_(norms, [len(kernel) ** 0.5 for kernel in kernels])
            torch._foreach_div_(kernels, norms)
            torch._foreach_add_(kernels, updates, alpha=-group["lr"])


def _orthogonalised(kernels: list[Tensor]) -> list[Tensor]:
    """Kernels (out, in, h, w), those of one shape side by side, each orthogonalised as a matrix of `out` rows: bfloat16
    of the same shapes. Changes the arguments."""
    norms = torch._foreach_norm(kernels)
    torch._foreach_add_(norms, 1e-7)
    torch._foreach_div_(kernels, norms)
    shapes = [(shape, len(list(same))) for shape, same in groupby(kernel.shape for kernel in kernels)]
    stacks = [kernels[0].new_empty(count, o, h, w, c, dtype=torch.bfloat16) for (o, c, h, w), count in shapes]
    torch._foreach_copy_(_as_kernels(stacks), kernels)
    return _as_kernels([orthogonalise(stack.flatten(2)).view(stack.shape) for stack in stacks])


def _as_kernels(stacks: list[Tensor]) -> list[Tensor]:
    """Stacks (count, out, h, w, in), in which a kernel in channels_last is contiguous, as kernels (out, in, h, w)."""
    return [kernel for stack in stacks for kernel in stack.permute(0, 1, 4, 2, 3).unbind()]


class Optimizers:
    """The optimizers of one network, with learning rates that are a function of the step alone."""

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int, cuda_graphs: bool = False) -> None:
        self.config, self.total_steps = config, total_steps
        kinds: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kinds.setdefault(parameter_kind(name, parameter), []).append(parameter)
        algorithms: dict[str, list[dict[str, Any]]] = {}
        for kind, parameters in kinds.items():
            settings = config.group(kind)
            settings |= {"params": parameters, "peak": settings["lr"], "kind": kind}
            algorithms.setdefault(settings.pop("algorithm"), []).append(settings)
        self.all = [_build(algorithm, groups, cuda_graphs) for algorithm, groups in sorted(algorithms.items())]

    def set_rates(self, step: int) -> float:
        """Set every group's learning rate for the step after `step` finished ones. Returns that of the kernels."""
        kernels = 0.0
        for optimizer in self.all:
            for group in optimizer.param_groups:
                end = steps_in(group["until"], self.total_steps)
                group["lr"] = group["peak"] * factor(self.config, step / end if end else 1.0)
                if group["kind"] == "kernels":
                    kernels = group["lr"]
        return kernels

    def learns(self, kind: str, step: int) -> bool:
        """Whether a kind of parameters may still change after `step` finished steps."""
        return step < steps_in(self.config.group(kind)["until"], self.total_steps)

    def step(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Apply the gradients; with a scaler enabled, skip the step where one of them overflowed. Returns the norm of
        the whole gradient: a float32 scalar on the device."""
        for optimizer in self.all:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(
            parameter.grad
            for optimizer in self.all
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        )
        # scaler.step would wait for the device once for each optimizer, and skip only those that have the overflow
        if not scaler.is_enabled() or norm.isfinite():
            for optimizer in self.all:
                optimizer.step()
        scaler.update()
        return norm

    def state(self) -> list[dict[str, Any]]:
        """The state of every optimizer, for a checkpoint; the tensors are not copied."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load(self, states: list[dict[str, Any]]) -> None:
        """Restore what `state` returned. Raises the errors of torch, and ValueError for tensors of other shapes."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
            for parameter, kept in optimizer.state.items():
                if any(isinstance(t, Tensor) and t.ndim and t.shape != parameter.shape for t in kept.values()):
                    raise ValueError("the state of an optimizer has other shapes than the weights")


def _build(algorithm: str, groups: list[dict[str, Any]], cuda_graphs: bool) -> torch.optim.Optimizer:
    if algorithm == "muon":
        return Muon(groups, lr=0.0, momentum=0.0, cuda_graphs=cuda_graphs)
    if algorithm == "sgd":
        for group in groups:
            group["nesterov"] = group["momentum"] > 0
        return torch.optim.SGD(groups, lr=0.0, foreach=True)
    for group in groups:
        group["betas"] = (group["momentum"], 0.999)
    return torch.optim.AdamW(groups, lr=0.0, foreach=True)
