"""Measures the cost of mixing L convolutions: every form of a block, against its L convolutions alone.

    python -m benchmarks.mixing [--rounds 7] [--out FILE]

Forward and backward pass with all gradients, those of the coefficients and of their layer included, in bf16 autocast
and channels_last, on a GPU or one CPU thread. The forms take turns. On a CPU the time is CPU time, which other
processes affect less. Prints a Markdown row for each block: the milliseconds of the convolutions alone, and the ratios
to these within a round, as median (quartiles). --out appends the table to a file.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import arguments
from benchmarks.table import measured_on, publish, spread, table
from benchmarks.table import row as line
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.distributed.device import keep_memory
from dist_train.errors import DONE
from dist_train.model.mixing import Form, average, choose, mix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS: list[Form] = ["outputs", "inputs", "kernels"]
Branch = dict[str, int]  # settings of a convolution
Case = tuple[str, int, int, int, int, list[Branch]]  # name, images, c, channels, size, branches
_3X3, _1X1 = {"kernel_size": 3, "padding": 1}, {"kernel_size": 1}
ONE, MIXED, THREE = [_3X3], [_3X3, _1X1], [_3X3] * 3
CASES: list[Case] = [
    ("block94, 1", 250, 24, 64, 31, ONE),
    ("block94, 2", 250, 64, 64, 15, MIXED),
    ("block94, 3", 250, 64, 256, 15, ONE),
    ("block94, 4 and 5", 250, 256, 256, 7, MIXED),
    ("block94, 6", 250, 256, 256, 3, MIXED),
    ("3x3 and 1x1", 250, 24, 64, 31, MIXED),
    ("3x3 and 1x1", 250, 64, 256, 15, MIXED),
    *(("depthwise", 250, c, c, size, [_3X3, {**_1X1, "groups": c}]) for c, size in ((64, 15), (256, 7), (256, 3))),
    ("digits, 1", 16, 16, 32, 16, MIXED),
    ("digits, 2", 16, 32, 64, 8, [_3X3, {**_3X3, "padding": 2, "dilation": 2}, _1X1]),
    *(("three 3x3", n, c, c, 16, THREE) for n, c in ((125, 64), (250, 64), (125, 128))),
    *(("three 3x3", n, c, c, 8, THREE) for n, c in ((125, 64), (500, 64), (125, 128), (250, 128), (125, 256))),
]


def kinds(case: Case) -> tuple[dict[str, Callable[[], None]], Form]:
    """The functions to time, by name: `alone` and the forms; and the form that the network chooses."""
    _, n, c, channels, size, branches = case

    def images(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)

    x, direction = images(n, c, size, size).requires_grad_(), images(n, channels, size, size)
    convolutions = [nn.Conv2d(c, channels, bias=False, **branch) for branch in branches]  # type: ignore[arg-type]
    fc = nn.Linear(c, len(branches))
    modules = nn.ModuleList([fc, *convolutions]).to(DEVICE).to(memory_format=torch.channels_last)

    def backward(output: Callable[[], Tensor]) -> None:
        x.grad = None
        with torch.autocast(DEVICE.type, torch.bfloat16):
            result = output()
        result.backward(direction)

    def alone() -> None:
        modules.zero_grad()
        for convolution in convolutions:
            backward(lambda convolution=convolution: convolution(x))  # type: ignore[misc]

    def block(form: Form) -> Tensor:
        averages, same = average(x, torch.float32)
        with torch.autocast(DEVICE.type, enabled=False):
            coefficients = fc(averages)
        return mix(coefficients, same, convolutions, form)

    def mixed(form: Form) -> Callable[[], None]:
        def run() -> None:
            modules.zero_grad()
            backward(lambda: block(form))

        return run

    functions: dict[str, Callable[[], None]] = {"alone": alone}
    for form in FORMS:
        try:
            mixed(form)()
        except ValueError:
            continue
        functions[form] = mixed(form)
    return functions, choose(x.shape, convolutions, DEVICE.type)


def clock() -> float:
    """Seconds: of this process's CPU time, or on a GPU of the wall clock once the GPU is idle."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measured(case: Case, rounds: int) -> list[str]:
    """The cells of a block's row."""
    name, n, c, channels, size, branches = case
    functions, chosen = kinds(case)
    seconds: dict[str, list[float]] = {kind: [] for kind in functions}
    for number in range(rounds + 1):
        for kind, function in functions.items():
            begin = clock()
            function()
            if number:  # the first round warms up
                seconds[kind].append(clock() - begin)
    ratios = {form: [a / b for a, b in zip(seconds[form], seconds["alone"], strict=True)] for form in functions}
    best = min(statistics.median(ratios[form]) for form in FORMS if form in ratios)
    return [
        name,
        f"{n} x {c} -> {channels} @ {size}: " + " + ".join(map(_name, branches)),
        spread([1000 * value for value in seconds["alone"]], 1),
        *(spread(ratios[form], 2) if form in ratios else "" for form in FORMS),
        chosen,
        f"**{statistics.median(ratios[chosen]):.2f}**",
        f"{statistics.median(ratios[chosen]) / best:.2f}",
    ]


def _name(branch: Branch) -> str:
    dilation = branch.get("dilation", 1)
    words = [f"{branch['kernel_size']}x{branch['kernel_size']}", f"d{dilation}" * (dilation > 1)]
    return " ".join([*filter(None, words), *(["depthwise"] if "groups" in branch else [])])


@answers_bad_input
def main() -> int:
    parser = arguments.parser("mixing", __doc__)
    parser.add_argument("--rounds", type=positive, default=7)
    arguments.add_out(parser)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for case in CASES:
        rows.append(measured(case, options.rounds))
        print(line(rows[-1]), flush=True)
    headers = ["block", "shape", "alone, ms", *FORMS, "chosen", "its ratio", "to the best form"]
    conditions = f"n = {options.rounds}; {measured_on(DEVICE, os.cpu_count() or 1)}"
    print()
    publish("benchmarks.mixing", conditions, table(headers, rows), options.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
