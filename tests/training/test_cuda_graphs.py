"""CUDA graphs give the bits of kernels that are launched one by one.

Without a GPU a recording is replayed by calling the work again, on the CPU: all but CUDA itself is real.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, trainer
from graph_capture import Capture
from peers import run_ranks

from dist_train.config.loading import load
from dist_train.distributed.ranks import Ranks
from dist_train.main import main
from dist_train.model.network import BlockNetwork
from dist_train.runs.contents import read_summary
from dist_train.training import cuda_graphs
from dist_train.training.loop import TrainStep
from dist_train.training.optimizers import Muon

ON_GPU = torch.cuda.is_available()
SELECT = 'train.select={fraction=0.5, start=0.5, losses="last"}'
SIZES = 'data.smaller=[{size=20, until=0.25, how="scale"}]'
CASES = {
    "kinds of steps": [SIZES, SELECT, "optim.stem.until=0.4", "precision=bf16"],
    "selected now": ["train.select={fraction=0.5, size=20}", "precision=bf16"],
    "branches": ["model.blocks.0.norm=branch", "model.blocks.1.activate=branch", "precision=bf16"],
    "dropout": ["model.blocks.0.dropout=0.2", "model.output.hidden=[16]", "model.output.dropout=0.1"],
    "fp16": ["precision=fp16"],
    "depthwise 1x1": ["model.blocks.1={channels=32, convolutions=[{kernel=3}, {kernel=1, groups=32}]}"],
}


class Replaying:
    """A recording without CUDA."""

    made = replayed = 0

    def __init__(self, work: Callable[[], None], stream: object, pool: object = None) -> None:
        self.work = work
        with Capture() as capture:
            work()
            capture.strict = True
            work()
        Replaying.made += 1

    def replay(self) -> None:
        self.work()
        Replaying.replayed += 1


class TorchWithoutCuda:
    """torch, but for streams and events that do nothing."""

    nothing = SimpleNamespace(device=None, **dict.fromkeys(("wait_event", "wait_stream", "record"), lambda *_: None))
    names = ("Stream", "Event", "current_stream", "graph_pool_handle")
    cuda = SimpleNamespace(stream=nullcontext, **dict.fromkeys(names, lambda *_: TorchWithoutCuda.nothing))

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def replay_on_the_cpu() -> None:
    """Replace CUDA in this process."""
    patch.object(cuda_graphs, "torch", TorchWithoutCuda()).start()
    patch.object(cuda_graphs, "Recording", Replaying).start()


def train(arguments: list[str], folder: str, graphs: bool) -> tuple[int, int, str]:
    """Train on the CPU. Returns the numbers of recordings and of their replays, and the weights' digest."""
    os.dup2(os.open(f"{folder}.{os.environ['RANK']}.log", os.O_CREAT | os.O_WRONLY), 2)
    if graphs:
        replay_on_the_cpu()
        original = TrainStep.__init__

        def on_a_gpu(self: TrainStep, settings: object, data: object, ranks: object, state: object) -> None:
            with patch.object(Ranks, "on_gpu", True):
                original(self, settings, data, ranks, state)  # type: ignore[arg-type]

        patch.object(TrainStep, "__init__", on_a_gpu).start()
    assert main([*arguments, "device=cpu", "--run-dir", folder]) == 0
    summary = read_summary(Path(folder))
    return Replaying.made, Replaying.replayed, str(summary and summary["weights_sha256"])


@pytest.mark.skipif(ON_GPU, reason="the next test has real graphs")
@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_without_graphs(digits: Path, tmp_path: Path, name: str) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=2", "optim.kernels.algorithm=muon"]
    arguments += ["optim.kernels.lr=0.02", *CASES[name]]
    digests = set()
    for ranks, graphs in ((1, False), (1, True), *([(3, True)] if name == "kinds of steps" else [])):
        for answer in run_ranks(ranks, train, arguments, str(tmp_path / f"{ranks}-{graphs}"), graphs):
            assert answer.value, answer.error
            made, replayed, digest = answer.value
            assert (replayed > made > 0) == graphs
            digests.add(digest)
    assert len(digests) == 1


@pytest.mark.skipif(not ON_GPU, reason="torch finds no GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_the_weights_are_those_without_graphs(digits: Path, tmp_path: Path, name: str) -> None:
    for graphs in ("true", "false"):
        arguments = [f"data.dir={digits}", *TINY, *CASES[name], f"cuda_graphs={graphs}", "device=cuda"]
        trainer("--preset", "digits", *arguments, "--run-dir", tmp_path / graphs)
    recorded, launched = (read_summary(tmp_path / graphs) for graphs in ("true", "false"))
    assert recorded is not None
    assert launched is not None
    assert recorded["weights_sha256"] == launched["weights_sha256"]


def test_an_error_during_a_recording_is_that_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    cuda = SimpleNamespace(**vars(TorchWithoutCuda.cuda), graph=capture, CUDAGraph=object)
    monkeypatch.setattr(TorchWithoutCuda, "cuda", cuda)
    monkeypatch.setattr(cuda_graphs, "torch", TorchWithoutCuda())
    calls = iter((None, torch.OutOfMemoryError("CUDA out of memory")))

    def work() -> None:
        if error := next(calls):
            raise error

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        cuda_graphs.Recording(work, TorchWithoutCuda.nothing)  # type: ignore[arg-type]


@pytest.mark.skipif(ON_GPU, reason="it would replay on the CPU")
def test_a_replayed_update_is_the_launched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    replay_on_the_cpu()
    try:
        weights = []
        for graphs in (False, True):
            torch.manual_seed(0)
            model = BlockNetwork(load("digits", None, []).model, (3, 16, 16), 10)
            muon = Muon(model.kernels, lr=0.1, momentum=0.6, cuda_graphs=graphs)
            for _ in range(3):
                for kernel in model.kernels:
                    kernel.grad = torch.randn_like(kernel)
                muon.step()
            weights.append(model.kernels)
    finally:
        patch.stopall()
    assert all(map(torch.equal, *weights))
