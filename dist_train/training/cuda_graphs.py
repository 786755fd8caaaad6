"""CUDA graphs: launches that are recorded once and then replayed as one.

A step launches thousands of kernels of a few microseconds each, which takes a host ten times as long as a GPU needs to
compute them. What is replayed are the same kernels on the same numbers, and so the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_train.data.batches import Microbatch

# Graphs of microbatches that run at the same time: one alone leaves most of a GPU idle.
_LANES = 4


class Recording:
    """Work on fixed tensors as a CUDA graph."""

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None) -> None:
        """Run `work` once, so that libraries load and choose their kernels, and record it. It must read and write the
        same tensors at each call, and never wait for the device. pool: of memory, shared with other graphs of which
        none runs at the same time. Raises what `work` raises."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            work()
        self.graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as those of NCCL, may call CUDA meanwhile
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            # the end of the capture raises an error of its own, which hides the one of the work
            raise error.__context__ or error from None
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def replay(self) -> None:
        """Queue the work in the current stream."""
        self.graph.replay()


class Replayed:
    """A function of tensors, recorded at its first call: (inputs) to outputs, lists of tensors on one GPU. Inputs must
    have the same shapes and dtypes at each call. Outputs are overwritten by the next call."""

    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.function = function
        self.recording: Recording | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        if self.recording is None:
            self.inputs = [tensor.clone() for tensor in inputs]

            def work() -> None:
                self.outputs = self.function(self.inputs)

            self.recording = Recording(work, torch.cuda.Stream(inputs[0].device))
        torch._foreach_copy_(self.inputs, inputs)
        self.recording.replay()
        return self.outputs


@dataclass
class _Lane:
    """A stream, and the tensors of the graphs that run in it, one at a time. gradient: (parameters,) float32.
    metrics: (3,) float64. inputs: (images, labels, indices) by the images' shape. taken: an event after which the next
    graph may overwrite the gradient and the metrics."""

    stream: torch.cuda.Stream
    gradient: Tensor
    metrics: Tensor
    pool: Any = field(default_factory=lambda: torch.cuda.graph_pool_handle())
    taken: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())
    done: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())
    inputs: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    recordings: dict[Hashable, Recording] = field(default_factory=dict)


class MicrobatchGraphs:
    """The work of one microbatch as CUDA graphs, one for each kind of step, several of which run at the same time."""

    def __init__(self, device: torch.device, parameters: int, at_once: int) -> None:
        """parameters: numbers in a gradient. at_once: the most microbatches that may run at the same time."""
        self.lanes = [
            _Lane(
                torch.cuda.Stream(device),
                torch.zeros(parameters, device=device),
                torch.zeros(3, dtype=torch.float64, device=device),
            )
            for _ in range(min(at_once, _LANES))
        ]

    def record(self, kind: Hashable, like: Microbatch, work: Callable[[Microbatch, Tensor, Tensor], None]) -> None:
        """Record the work on microbatches of a kind of step. like: one of them. work: writes a microbatch's gradient
        and metrics, as `_Lane` has them, into its last two arguments."""
        for lane in self.lanes:
            key = like.images.shape
            if key not in lane.inputs:
                lane.inputs[key] = like.images.clone(), like.labels.clone(), like.indices.clone()
            batch = Microbatch(0, *lane.inputs[key])
            lane.recordings[kind] = Recording(
                lambda lane=lane, batch=batch: work(batch, lane.gradient, lane.metrics),  # type: ignore[misc]
                lane.stream,
                lane.pool,
            )

    def begin(self) -> None:
        """Begin a step: what the current stream holds so far comes before all of its microbatches."""
        for lane in self.lanes:
            lane.taken.record()

    def __call__(self, index: int, kind: Hashable, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Queue the work on this rank's microbatch number `index`. Returns its gradient, (parameters,) float32, and
        its metrics, (3,) float64. The batch must be kept until the step ends."""
        lane = self.lanes[index % len(self.lanes)]
        lane.stream.wait_event(lane.taken)
        with torch.cuda.stream(lane.stream):
            inputs = lane.inputs[batch.images.shape]
            for fixed, tensor in zip(inputs, (batch.images, batch.labels, batch.indices), strict=True):
                fixed.copy_(tensor)
            lane.recordings[kind].replay()
            lane.done.record()
        torch.cuda.current_stream().wait_event(lane.done)
        result = lane.gradient.clone(), lane.metrics.clone()
        lane.taken.record()
        return result
