"""Training on the hardest images of each microbatch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lines
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_train import config
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest
from dist_train.distributed.ranks import Ranks
from dist_train.model.network import BatchNorm, BlockNetwork, MixedBlock
from dist_train.model.shapes import flops, training_flops
from dist_train.runs import layout
from dist_train.runs.checkpoint import Checkpoint, tensor_digests
from dist_train.runs.run import Run
from dist_train.training.batch_norm import accuracy_by_mode, measure_statistics
from dist_train.training.loop import State
from dist_train.training.selection import LastLosses, Selection, hardest

Train = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("how", ["size=16", "losses='last'"])
def test_the_same_bits_on_any_number_of_ranks_and_after_a_resume(train: Train, tmp_path: Path, how: str) -> None:
    settings = [f"train.select={{fraction=0.4, start=0.3, until=0.9, {how}}}", "every_steps=1", "keep=99"]
    settings += ["data.smaller=[{size=20, until=0.4}]", "precision=bf16"]
    alone = train("1", *settings)
    for ranks in (2, 4):
        assert train(str(ranks), *settings, ranks=ranks)["weights_sha256"] == alone["weights_sha256"]
        assert lines(tmp_path / str(ranks)) == lines(tmp_path / "1")
    # no checkpoint before the last step: the ranks exchange last losses at the end of an epoch alone
    assert (
        train("rarely", *settings, "every_steps=0", "every_epochs=9", ranks=2)["weights_sha256"]
        == alone["weights_sha256"]
    )
    whole = lines(tmp_path / "1")
    resumed = shutil.copytree(tmp_path / "1", tmp_path / "resumed")
    (resumed / layout.SUMMARY).unlink()
    for path in layout.checkpoints(layout.checkpoint_folder(resumed)):
        if layout.step_of(path) > 6:
            path.unlink()
    assert train("resumed", *settings)["weights_sha256"] == alone["weights_sha256"]
    assert lines(resumed) == whole
    assert [start["step"] for start in Run(resumed).starts] == [0, 6]

    # 5 steps an epoch of 8 microbatches of 32 images: 13 of them in steps 4 to 9
    rows = [row for row in whole if row["kind"] == "step"]
    assert [row["images"] for row in rows] == [8 * (13 if 3 <= step < 9 else 32) for step in range(10)]
    assert all(row["correct"] <= row["images"] for row in rows)
    model = config.load("digits", None, []).model
    for step, row in enumerate(rows):
        size = 20 if step < 4 else 32
        choosing = 256 * sum(map(sum, flops(model, (3, 16, 16), 10))) if how == "size=16" and 3 <= step < 9 else 0
        assert row["flops"] == row["images"] * training_flops(model, (3, size, size), 10, True) + choosing
    assert alone["train_flops"] == sum(row["flops"] for row in rows)
    if how == "size=16":  # images of the first epoch have no last losses
        hard, plain = (rows[3]["correct"] / rows[3]["images"], rows[2]["correct"] / rows[2]["images"])
        assert hard < plain + 0.1
    seconds = sum(row["images"] / row["images_per_second"] for row in Run(tmp_path / "1").steps)
    assert alone["train_seconds"] == pytest.approx(seconds)


def selection(digits: Path, *settings: str) -> tuple[Selection, BlockNetwork, Data]:
    own = ["model.blocks.0.dropout=0.5", "label_smoothing=0.1", "precision=fp32", f"data.dir={digits}"]
    found = config.load("digits", None, [*own, *settings])
    data = Data(found.data, found.train, manifest(found.data), Ranks(0, 1, CPU, CPU))
    torch.manual_seed(5)
    network = BlockNetwork(found.model, (3, 32, 32), 10)
    losses = State.start(found, network, data.total_steps, data.images).losses
    return Selection(found.train, data, network, losses), network, data


@pytest.mark.parametrize("size", [0, 16, 40])
def test_the_images_of_the_highest_losses_are_kept(digits: Path, size: int) -> None:
    select, network, data = selection(digits, f"train.select={{fraction=0.25, size={size}}}")
    batch = next(data.steps(0))[3]
    found = select(batch, 0)
    assert network.training
    # the network in training mode, but without its dropout
    images = F.interpolate(batch.images, (16, 16), mode="bilinear", antialias=True) if size == 16 else batch.images
    block = network.blocks[0]
    assert isinstance(block, MixedBlock)
    block.config = replace(block.config, dropout=0.0)
    log_p = network(images).log_softmax(1)
    losses = -(0.9 * log_p[torch.arange(16), batch.labels] + 0.1 * log_p.mean(1))
    kept = losses.detach().numpy().argsort()[-4:]
    assert found.indices.tolist() == batch.indices[np.sort(kept)].tolist()
    assert found.slot == batch.slot == 3
    at = [batch.indices.tolist().index(number) for number in found.indices.tolist()]
    assert torch.equal(found.images, batch.images[at])
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.labels, batch.labels[at])


def test_images_are_kept_by_their_last_losses(digits: Path) -> None:
    select, network, data = selection(digits, "train.select={fraction=0.25, losses='last'}", "data.eval_batch=2000")
    network.forward = None  # type: ignore[assignment, method-assign]
    assert select.losses is not None
    assert select.flops(0) == 0
    batches = [batch for step, _ in zip(data.steps(0), range(11), strict=False) for batch in step]
    values = torch.rand(data.images).half()
    for batch in batches[:-2]:
        select.losses.record(batch.indices, values[batch.indices])
    for batch in batches[:-2]:
        order = values[batch.indices].argsort(descending=True, stable=True)[:4]
        assert select(batch, 0).indices.tolist() == batch.indices[order.sort().values].tolist()
    # an image without a loss counts as the hardest
    select.losses.record(batches[-2].indices[:14], torch.full((14,), 1e9))
    assert select(batches[-2], 0).indices.tolist() == batches[-2].indices[[0, 1, 14, 15]].tolist()
    assert select(batches[-1], 0).indices.tolist() == batches[-1].indices[:4].tolist()
    # statistics of the hardest of as many at a time
    ((images, labels, indices),) = data.statistics()
    first, *_ = next(select.statistics(1))
    count = len(images) // 16
    part = (
        select.losses.values[indices].tensor_split(count)[0].argsort(descending=True, stable=True)[: len(first.labels)]
    )
    assert torch.equal(first.images, images[part.sort().values])
    assert torch.equal(first.labels, labels[part.sort().values])
    words = "the hardest 25 % of each microbatch, by their last losses"
    assert select.settings.select.words == words


def test_last_losses_are_a_part_of_a_checkpoint(digits: Path) -> None:
    found = config.load("digits", None, ["train.select={fraction=0.5, losses='last'}", f"data.dir={digits}"])
    network = BlockNetwork(found.model, (3, 32, 32), 10)
    state, other = (State.start(found, network, 10, images) for images in (40, 41))
    assert isinstance(state.losses, LastLosses)
    state.losses.record(torch.tensor([3, 5]), torch.tensor([0.25, 7.0]))
    dumped = Checkpoint.from_dict({**state.dump(), "step": 3})
    assert tensor_digests(dumped)["losses"]
    assert dumped.losses is not None
    again = State.start(found, network, 10, 40)
    again.load(dumped)
    assert again.losses is not None
    assert again.losses.values.tolist() == [0.25 if i == 3 else 7.0 if i == 5 else math.inf for i in range(40)]
    for checkpoint in (replace(dumped, losses=None), replace(dumped, losses=dumped.losses[:39])):
        with pytest.raises(ValueError, match="it has no loss of each training image"):
            again.load(checkpoint)
    with pytest.raises(ValueError, match="it has no loss of each training image"):
        other.load(dumped)
    plain = State.start(config.load("digits", None, ["train.select.fraction=0.5"]), network, 10, 40)
    assert plain.losses is None
    assert "losses" not in plain.dump()
    assert "losses" not in tensor_digests(Checkpoint.from_dict(plain.dump()))


def test_a_step_that_keeps_all_images_is_left_as_it_is(digits: Path) -> None:
    select, network, data = selection(digits, "train.select={fraction=1.0}")
    batch = next(data.steps(0))[0]
    network.forward = None  # type: ignore[assignment, method-assign]
    assert select(batch, 0) is batch
    assert (select.kept(0), select.flops(0)) == (16, 0)
    select, network, _ = selection(digits, "train.select={fraction=0.5, start=0.1, until=0.155}")
    network.forward = None  # type: ignore[assignment, method-assign]
    assert select(batch, 10) is batch  # of 11 in an epoch
    assert [select.kept(step) for step in (10, 11, 16, 17)] == [16, 8, 8, 16]
    assert select.settings.select.words == "the hardest 50 % of each microbatch, from 10 to 15.5 % of the run"
    plain = config.load("digits", None, [])
    assert plain.train.select.words == ""
    assert config.digest(config.load("digits", None, ["train.select={fraction=1.0}"])) == config.digest(plain)
    assert config.digest(config.load("digits", None, ["train.select={fraction=0.5}"])) != config.digest(plain)


@pytest.mark.parametrize("size", [0, 16])
def test_the_operations_of_choosing_are_those_that_run(digits: Path, size: int) -> None:
    select, _, data = selection(digits, f"train.select={{fraction=0.5, size={size}}}")
    with FlopCounterMode(display=False) as counter:
        for batch in next(data.steps(0)):
            select(batch, 0)
    assert select.flops(0) == counter.get_total_flops()


def test_batch_norms_have_the_statistics_of_the_images_that_a_step_trains_on(digits: Path) -> None:
    """Chosen of as many at a time as a microbatch has; then at least 1,000 in one batch."""
    settings = ["train.select={fraction=0.75, start=0.2, size=16}", "data.eval_batch=2000"]
    select, network, data = selection(digits, *settings)
    first = next(module for module in network.modules() if isinstance(module, BatchNorm))
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().double()))
    off, ranks = torch.autocast("cpu", enabled=False), data.ranks

    begin = math.ceil(0.2 * data.total_steps)
    ((images, labels, _),) = data.statistics()
    assert (len(images), data.size, data.total_steps, select.kept(begin)) == (1334, 16, 110, 12)
    chosen = []
    with torch.no_grad():
        for some, of_some in zip(images.tensor_split(83), labels.tensor_split(83), strict=True):
            network.batch_mode()
            log_p = network(F.interpolate(some, (16, 16), mode="bilinear", antialias=True)).log_softmax(1)
            losses = -(0.9 * log_p[torch.arange(len(some)), of_some] + 0.1 * log_p.mean(1))
            chosen.append(some[np.sort(losses.numpy().argsort()[-round(0.75 * len(some)) :])])
        network(torch.cat(chosen))
        hard = seen[-1]
        assert len(hard) >= 1000
        network(images)
        whole = seen[-1]
    for step, expected in ((0, whole), (begin, whole), (begin + 1, hard), (data.total_steps, hard)):
        measure_statistics(network, select, ranks, off, step)
        torch.testing.assert_close(first.mean.double(), expected.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(first.var.double(), expected.var((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(hard.mean((0, 2, 3)), whole.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert accuracy_by_mode(network, select, ranks, off, begin)[2] == 1334
    assert accuracy_by_mode(network, select, ranks, off, data.total_steps)[2] == len(hard)


def test_equal_losses_are_taken_in_order_and_one_that_is_no_number_is_noticed() -> None:
    assert hardest(torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0]), 3).tolist() == [0, 1, 2]
    assert hardest(torch.zeros(1000), 10).tolist() == [*range(10)]
    assert hardest(torch.tensor([1.0, 2.0, float("nan"), 3.0]), 1).tolist() == [2]
    losses: Tensor = torch.randint(0, 20, (300,)).float()
    expected = np.sort(np.argsort(-losses.numpy(), kind="stable")[:120])
    assert hardest(losses, 120).tolist() == expected.tolist()
