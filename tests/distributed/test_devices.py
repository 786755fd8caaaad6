"""Which device a rank takes, and what the ranks of one run tell each other about theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, trainer
from peers import run_ranks

from dist_train.distributed.device import Place, check_places, choose_place, matrix_rate, of_device
from dist_train.distributed.ranks import join_ranks
from dist_train.errors import UserError, needs_memory, shortage
from dist_train.main import main
from dist_train.model.network import BlockNetwork
from dist_train.runs import environment
from dist_train.runs.history import read_history
from dist_train.training import train

H100 = "NVIDIA H100 80GB HBM3"


def gpu(which: int | torch.device) -> SimpleNamespace:
    """What torch tells of a GPU."""
    index = which if isinstance(which, int) else which.index
    address = {"pci_domain_id": 0, "pci_bus_id": 27 + index, "pci_device_id": 0}
    return SimpleNamespace(name=H100, uuid=f"b1{index}", total_memory=80 << 30, **address)


def show_gpus(count: int, properties: Callable[[Any], SimpleNamespace] = gpu) -> None:
    """Have torch find that many GPUs in this process."""
    patch.object(torch.cuda, "device_count", lambda: count).start()
    patch.object(torch.cuda, "set_device", lambda _: None).start()
    patch.object(torch.cuda, "get_device_properties", properties).start()


@pytest.fixture(autouse=True)
def own_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    yield
    patch.stopall()


def test_a_single_visible_gpu_is_taken_whatever_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    show_gpus(1)
    assert [choose_place("auto", rank, share_gpus=False).device for rank in range(4)] == [torch.device("cuda", 0)] * 4
    show_gpus(4)
    assert [choose_place("cuda", rank, share_gpus=False).index for rank in range(4)] == [0, 1, 2, 3]
    assert choose_place("cpu", 3, share_gpus=False).device == torch.device("cpu")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    show_gpus(2)
    for rank in range(4):  # the same on every rank
        refused = choose_place("auto", rank, share_gpus=False).error
        assert refused.startswith("4 ranks were started on ")
        assert "where torch finds 2 GPUs; start at most 2 there (torchrun --nproc_per_node=2), or use " in refused
    assert [choose_place("auto", rank, share_gpus=True).index for rank in range(4)] == [0, 1, 0, 1]


def test_a_gpu_that_cannot_be_used() -> None:
    def broken(_: int) -> SimpleNamespace:
        raise RuntimeError("CUDA driver initialization failed\nand more")

    show_gpus(1, broken)
    error = choose_place("auto", 0, share_gpus=False).error
    assert error.startswith("train.device = auto: torch cannot use a GPU of ")
    assert error.endswith("(CUDA driver initialization failed); repair its driver, or use train.device=cpu")


def test_two_ranks_on_one_gpu_are_refused() -> None:
    first, second = Place("a", 0, H100, "b10 at 0:1b:0"), Place("a", 0, H100, "b11 at 0:1c:0")
    check_places([first, second, Place("b", 0, H100, first.identity)], share_gpus=False)  # two devices called cuda:0
    check_places([Place("a"), Place("a"), Place("a")], share_gpus=False)
    check_places([first, first], share_gpus=True)
    with pytest.raises(UserError) as refused:
        check_places([first, second, first], share_gpus=False)
    assert str(refused.value).startswith(
        f"ranks 0 and 2 have the same GPU ({H100}, cuda:0 of a, b10 at 0:1b:0); start "
    )
    assert "train.backend=gloo" in str(refused.value)


def join_with_a_gpu_on_rank_0() -> str:
    if os.environ["RANK"] == "0":
        show_gpus(1)
    with pytest.raises(UserError) as refused, join_ranks("auto", threads=1, deterministic=True, timeout=20):
        pass
    return str(refused.value)


def test_a_rank_without_gpu_among_others_is_refused_on_all_ranks() -> None:
    sentence, *same = [answer.value for answer in run_ranks(3, join_with_a_gpu_on_rank_0)]
    assert sentence.startswith(f"rank 0 has a GPU ({H100}, cuda:0 of ")
    assert "and rank 1 has none (CPU of " in sentence
    assert same == [sentence] * 2


def test_no_gpu_is_said_once(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", "device=cuda", "--run-dir", tmp_path / "run"]
    done = trainer(*arguments, ranks=2, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert done.stderr.count("dist_train: train.device = cuda, but torch finds no GPU on ") == 1
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


def train_on_other_processors(data: Path, folder: Path) -> int:
    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder.with_suffix(f".{rank}"), os.O_CREAT | os.O_WRONLY), 2)
    patch.object(environment, "device_name", lambda _: f"Processor {rank // 2}").start()
    return main(["--preset", "digits", f"data.dir={data}", *TINY, "epochs=1", "device=cpu", "--run-dir", str(folder)])


def test_every_ranks_machine_is_recorded_and_a_mixture_is_said_once(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert [answer.value for answer in run_ranks(3, train_on_other_processors, digits, folder)] == [0, 0, 0]
    differences = "device (Processor 0 on rank 0 and 1 more, Processor 1 on rank 2)"
    said = f"dist_train: the ranks differ in {differences}: the weights may differ in bits from those of ranks that are"
    assert folder.with_suffix(".0").read_text().startswith(said)
    assert [folder.with_suffix(f".{rank}").read_text().count("the ranks differ") for rank in range(3)] == [1, 0, 0]
    start = read_history(folder)[0]
    assert [each["device"] for each in start["ranks"]] == ["Processor 0", "Processor 0", "Processor 1"]
    assert {(each["host"], each["torch"]) for each in start["ranks"]} == {(start["host"], torch.__version__)}
    assert all(each["memory"] > 1 << 30 for each in start["ranks"])
    assert start["environment"]["device"] == "Processor 0 and Processor 1"
    assert json.loads((folder / "summary.json").read_text())["device"] == "Processor 0 and Processor 1"


def train_from_other_weights(data: Path, folder: Path) -> int:
    rank = int(os.environ["RANK"])

    def build(*arguments: Any, original: Callable[..., BlockNetwork] = train.build_model) -> BlockNetwork:
        model = original(*arguments)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor += rank
        return model

    patch.object(train, "build_model", build).start()
    return main(["--preset", "digits", f"data.dir={data}", *TINY, "epochs=1", "device=cpu", "--run-dir", str(folder)])


def test_all_ranks_start_from_the_weights_of_rank_0(digits: Path, tmp_path: Path) -> None:
    digests = []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        assert [answer.value for answer in run_ranks(ranks, train_from_other_weights, digits, folder)] == [0] * ranks
        digests.append(json.loads((folder / "summary.json").read_text())["weights_sha256"])
    assert digests[0] == digests[1]


def test_the_record_of_a_gpu() -> None:
    show_gpus(2)
    found = environment.machine(torch.device("cuda", 1))
    assert (found["uuid"], found["memory"]) == ("b11", 80 << 30)
    assert {"host", "nccl", "driver"} < found.keys()


def test_errors_of_memory_and_of_devices() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
    )
    text += "free. Process 7 has 77.90 GiB memory in use. Of the allocated memory 1 GiB is allocated by PyTorch."
    memory = torch.OutOfMemoryError(text)
    assert needs_memory(memory)
    assert shortage(memory).endswith(" 1.20 GiB is free. Process 7 has 77.90 GiB memory in use")
    for words in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        assert needs_memory(RuntimeError(words))
        assert not of_device(RuntimeError(words))
    for error in (torch.AcceleratorError("CUDA error: unspecified launch failure"), RuntimeError("cuDNN error: X")):
        assert of_device(error)
        assert not needs_memory(error)
    assert not of_device(RuntimeError("NCCL error in: x.cpp:7, unhandled cuda error"))  # perhaps of a peer


def test_other_work_on_a_core_does_not_lower_the_rate_of_its_matrix_products() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread and the process that it starts
    try:
        alone = matrix_rate(torch.device("cpu"), torch.float32)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            try:
                shared = matrix_rate(torch.device("cpu"), torch.float32)
            finally:
                other.kill()
    finally:
        os.sched_setaffinity(0, cores)
    assert shared > 0.7 * alone
