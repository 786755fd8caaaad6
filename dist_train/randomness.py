"""All randomness of a run: functions of the seed, a purpose, and the numbers of epoch, step or sample alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for one purpose of a run, the same on every machine and rank. numbers: such as the epoch."""
    digest = hashlib.sha256(repr((seed, purpose, *numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(count: int, seed: int) -> Tensor:
    """A random order of `count` items: int64 of shape (count,), on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def sample_bits(indices: Tensor, seed: int) -> Tensor:
    """64 random bits for each sample, whatever batch it is in: int64 of the shape and device of `indices`.

    SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") as a counter-based
    generator; integer arithmetic gives the same bits on every device.
    """
    x = indices * -0x61C8864680B583EB + seed
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def uniform_integers(bits: Tensor, count: int) -> Tensor:
    """Integers in 0..count-1, of the shape of `bits`, int64, from the low 32 of these random bits."""
    return ((bits & 0xFFFFFFFF) * count) >> 32


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's own on int64 is arithmetic."""
    return (x >> places) & ((1 << (64 - places)) - 1)
