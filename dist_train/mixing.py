"""The mixing of a block's branches: `a1*z1 + ... + aL*zL` with one coefficient per image and branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WeightedSum(torch.autograd.Function):
    """One pass over memory per branch in each direction, where autograd's own graph takes two or three."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, *branches: Tensor) -> Tensor:
        scales = coefficients.to(branches[0].dtype)[:, :, None, None, None].unbind(1)
        total = branches[0] * scales[0]
        for branch, scale in zip(branches[1:], scales[1:], strict=True):
            total.addcmul_(branch, scale)
        ctx.save_for_backward(coefficients, *branches)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        coefficients, *branches = ctx.saved_tensors
        scales = coefficients.to(grad.dtype)[:, :, None, None, None].unbind(1)
        grad_branches = [
            grad * scale if needed else None for scale, needed in zip(scales, ctx.needs_input_grad[1:], strict=True)
        ]
        if not ctx.needs_input_grad[0]:
            return (None, *grad_branches)
        # products keep the branches' dtype, their sum is taken in the coefficients' (float32 under autocast)
        dots = [(grad * branch).sum((1, 2, 3), dtype=coefficients.dtype) for branch in branches]
        return (torch.stack(dots, 1), *grad_branches)


def weighted_sum(coefficients: Tensor, branches: list[Tensor]) -> Tensor:
    """Sum L branch images with one coefficient per image and branch.

    coefficients: (N, L), float32 or wider. branches: L tensors (N, C, H, W) of one shape and dtype.
    Returns (N, C, H, W) in the branches' dtype and memory format. Differentiable once in everything.
    """
    result: Tensor = _WeightedSum.apply(coefficients, *branches)
    return result
