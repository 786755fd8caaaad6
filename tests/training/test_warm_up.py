"""The warm-up before training: every kind of step, and no change of the state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peers import run_ranks

from dist_train import config
from dist_train.data.batches import Data, Microbatch
from dist_train.data.dataset import manifest
from dist_train.distributed.ranks import join_ranks
from dist_train.model.network import weights_digest
from dist_train.training import warm_up
from dist_train.training.loop import State, TrainStep
from dist_train.training.optimizers import Optimizers
from dist_train.training.schedule import Kind, kinds
from dist_train.training.selection import Selection
from dist_train.training.train import build_model


def work(folder: str) -> tuple[list[str], list[tuple[int, int, bool]], bool]:
    """The kinds of steps after the fourth; number and size of the images, and whether the stem learns, of the steps
    that the warm-up runs; whether weights, optimizers and gradients are as before it."""
    smaller = "data.smaller=[{size=16, until=0.25}, {size=20, until=0.5}]"
    settings = [f"data.dir={folder}", smaller, "optim.stem.until=0.6", "precision=fp32", "epochs=2"]
    settings += ["batch_size=256", "microbatches=4", "train.select={fraction=0.25, start=0.8}"]
    loaded = config.load("digits", None, settings)
    t = loaded.train
    ran: list[tuple[int, int, bool]] = []

    def forward_backward(self: TrainStep, network: torch.nn.Module, batch: Microbatch, kind: Kind) -> object:
        ran.append((*batch.images.shape[::2], kind.stem_learns))
        return original(self, network, batch, kind)

    original, TrainStep.forward_backward = TrainStep.forward_backward, forward_backward  # type: ignore
    with join_ranks("cpu", 1, True, 60) as ranks:
        data = Data(loaded.data, t, manifest(loaded.data), ranks)
        model = build_model(loaded, data)
        optimizers = Optimizers(model, loaded.optim, data.total_steps)
        state = State(model, optimizers, torch.amp.GradScaler("cpu", enabled=False))
        before = weights_digest(model)
        selection = Selection(t, data, model, None)
        labels = [kind.label for kind, _ in kinds(data, optimizers, selection, start=4)]
        state.step = 4
        assert warm_up.warm_up(loaded, data, ranks, state) > 0
        kept = [tensor for o in optimizers.all for values in o.state.values() for tensor in values]
        untouched = state.step == 4 and not kept and all(p.grad is None for p in model.parameters())
        return labels, ran, untouched and weights_digest(model) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_kind_of_step_runs_once_on_a_copy(digits: Path, ranks: int) -> None:
    for answer in run_ranks(ranks, work, str(digits)):
        assert answer.value, answer.error
        labels, ran, untouched = answer.value
        plain = ["20x20, stem learns", "32x32, stem learns", "32x32, stem fixed"]
        assert labels == [*plain, "32x32, stem fixed, 16 of 64"]
        assert ran == [(64, 20, True), (64, 32, True), (64, 32, False), (16, 32, False)]
        assert untouched


def test_no_kind_falls_back_to_uncompiled_code(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more sizes than torch compiles by default; the graphs are run without generated code, which takes long."""
    sizes = range(8, 19)
    smaller = ", ".join(f"{{size={size}, until={size / 20}}}" for size in sizes)
    loaded = config.load("digits", None, [f"data.dir={digits}", f"data.smaller=[{smaller}]", "compile=true"])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, backend=backend, **options))
    settings = dataclasses.replace(loaded.train, batch_size=4, microbatches=1, precision="fp32", compile=True)
    try:
        with join_ranks("cpu", 1, True, 60) as ranks:
            data = Data(loaded.data, settings, manifest(loaded.data), ranks)
            model = build_model(loaded, data)
            optimizers = Optimizers(model, loaded.optim, 100)
            step = TrainStep(settings, data, ranks, State(model, optimizers, torch.amp.GradScaler(enabled=False)))
            for size in sizes:
                step.gradients.wrap()(torch.zeros(4, 3, size, size), True)
    finally:
        torch._dynamo.reset()
        torch.use_deterministic_algorithms(False)
    assert len(graphs) == len(sizes)
