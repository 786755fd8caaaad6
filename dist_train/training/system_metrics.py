"""Each rank's use of processor, memory and GPU, sampled by itself: `system/rank-N.jsonl` in the run folder."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_train.data_prep.files import no_links
from dist_train.runs.layout import samples_path

INTERVAL = 5.0  # seconds between two samples
_GIB = 2.0**30


@contextmanager
def sampled(run_dir: Path, rank: int, device: torch.device) -> Iterator[None]:
    """Sample this process in a thread, every 5 seconds and at the end.

    A line is `{"time", "host", "cpu_percent", "resident_gib"}`, on a GPU also torch's `"gpu_allocated_gib"` and
    `"gpu_reserved_gib"`, and, where NVML gives them, `"gpu_percent"`, `"gpu_watts"` and `"gpu_celsius"`. `time` is Unix
    time in seconds; 100 `cpu_percent` are one core. Raises nothing: what cannot be read or written is skipped.
    """
    end = threading.Event()
    thread = threading.Thread(target=_run, args=(run_dir, rank, device, end), name="system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(1.0)  # bounded, in case the file system hangs


def _run(run_dir: Path, rank: int, device: torch.device, end: threading.Event) -> None:
    process = psutil.Process()
    path = samples_path(run_dir, rank)
    with suppress(psutil.Error, OSError):
        path.parent.mkdir(exist_ok=True)
        process.cpu_percent()  # measures the time since its previous call
    while True:
        over = end.wait(INTERVAL)
        with suppress(psutil.Error, OSError), open(path, "a", encoding="utf-8", opener=no_links) as file:
            file.write(json.dumps(_sample(process, device)) + "\n")
        if over:
            return


def _sample(process: psutil.Process, device: torch.device) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "time": time.time(),
        "host": platform.node(),
        "cpu_percent": process.cpu_percent(),
        "resident_gib": process.memory_info().rss / _GIB,
    }
    if device.type == "cuda":
        sample["gpu_allocated_gib"] = torch.cuda.memory_allocated(device) / _GIB
        sample["gpu_reserved_gib"] = torch.cuda.memory_reserved(device) / _GIB
        readings: dict[str, Callable[[], float]] = {
            "gpu_percent": lambda: torch.cuda.utilization(device),
            "gpu_watts": lambda: torch.cuda.power_draw(device) / 1000,
            "gpu_celsius": lambda: torch.cuda.temperature(device),
        }
        for name, read in readings.items():
            with suppress(Exception):  # no nvidia-ml-py, no permission, or a GPU that does not measure it
                sample[name] = read()
    return sample
