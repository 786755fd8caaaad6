"""Settings that would have no effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from dist_train.config.settings import Config, Group
from dist_train.errors import UserError


def check_effects(config: Config, given: Iterable[str]) -> None:
    """Raises UserError for a setting that was given, differs from its default, and has no effect beside the others.

    given: dotted keys, of settings or of sections (config.given). For new runs: one that is resumed may have such
    settings from earlier versions."""
    given = [*given]
    for table, key, names, why, remedy in _without_effect(config):
        defaults = {field.name: field.default for field in fields(table)}
        for name in names:
            place, value = f"{key}.{name}", getattr(table, name)
            if value != defaults[name] and any(f"{place}.".startswith(f"{part}.") for part in given):
                raise UserError(f"{place} = {value} has no effect, since {why}; {remedy}, or remove it")


def _without_effect(config: Config) -> Iterator[tuple[Any, str, tuple[str, ...], str, str]]:
    """Settings without effect: their table, its dotted key, their names, the reason, and what would change that."""
    model, optim, select = config.model, config.optim, config.train.select
    for number, block in enumerate(model.blocks):
        key = f"model.blocks.{number}"
        if block.coefficients != "softmax":
            yield block, key, ("temperature",), f'coefficients = "{block.coefficients}"', "set coefficients to softmax"
        if block.pool == 1:
            yield block, key, ("pool_kind", "pool_at"), "pool = 1", "set pool"
        if block.activate == "none":
            yield block, key, ("activation",), 'activate = "none"', "set activate"
    of_stem = ("kernel", "stride", "padding", "channels", "activation")
    if model.stem.kind == "none":
        yield model.stem, "model.stem", of_stem, 'kind = "none"', "set kind"
        yield optim.stem, "optim.stem", _names(Group), 'model.stem.kind = "none"', "set that"
    elif model.stem.kind == "whiten":
        yield model.stem, "model.stem", ("channels",), 'kind = "whiten"', "set kind to conv"
    if not model.output.hidden:
        yield model.output, "model.output", ("activation", "dropout"), "hidden = []", "set hidden"
    if all(block.norm == "none" for block in model.blocks):
        yield model.batch_norm, "model.batch_norm", ("eps", "scale"), "no block has a norm", "set one"
        if not any(conv.bias for block in model.blocks for conv in block.convolutions):
            yield optim.norms, "optim.norms", _names(Group), "no block has a norm or a bias", "set one"
    if select.fraction == 1:
        yield select, "train.select", ("start", "until", "losses", "size"), "fraction = 1", "set fraction"
    elif select.start >= select.until:
        why = f"start = {select.start:g} is not before until = {select.until:g}"
        yield select, "train.select", ("fraction", "losses", "size"), why, "lower start"
    elif select.losses == "last":
        yield select, "train.select", ("size",), 'losses = "last"', "set losses to now"
    if optim.group("kernels")["algorithm"] == "muon":
        yield optim.kernels, "optim.kernels", ("weight_decay",), 'algorithm = "muon" has none', "set another"


def _names(table: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(table))
