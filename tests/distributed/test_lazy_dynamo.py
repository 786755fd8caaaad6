"""What a run does not need is not imported."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPOSITORY

SCRIPT = """
import sys
import torch
from dist_train.distributed.lazy_dynamo import skip_compiler_import

skip_compiler_import()
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()
assert weight[0] < 1
assert "torch._dynamo.eval_frame" not in sys.modules
assert "sympy" not in sys.modules

compiled = torch.compile(lambda x: x + 1, backend="eager")  # gets the real one
assert compiled(torch.ones(1)).item() == 2
assert "torch._dynamo.eval_frame" in sys.modules
"""


def test_the_compiler_is_not_imported_until_it_is_used() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], check=True, cwd=REPOSITORY, timeout=120)
