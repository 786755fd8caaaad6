"""A stand-in for `torch._dynamo`, so that a run which compiles nothing does not import torch's compiler.

torch's optimizers and DDP import it at their first use: 900 modules, 1.0 to 1.5 s of CPU time on every rank (torch 2.9,
2.14 and 2.15 on two cores of a Xeon), half as much as importing torch itself. No setting of torch avoids it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

_COMPILER = "torch._dynamo"


class _UnusedCompiler(ModuleType):
    """Replaces `torch._dynamo`: has the attributes that optimizers and DDP use when nothing is compiled, and imports
    the real module at the first access to any other."""

    def __init__(self) -> None:
        super().__init__(_COMPILER)
        self.utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "no_optimization")
        self.trace_rules = SimpleNamespace(
            LEGACY_MOD_INLINELIST=set(),
            get_legacy_mod_inlinelist=SimpleNamespace(cache_clear=lambda: None),
            clear_lru_cache=lambda: None,
        )

    @staticmethod
    def disable(function: Callable[..., Any], recursive: bool = True, **_: Any) -> Callable[..., Any]:
        """Mark a function as not to be compiled; without a compiler, the function itself."""
        return function

    @staticmethod
    def graph_break(**_: Any) -> None:
        """End a compiled part; without a compiler, nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # read by code that inspects all of sys.modules
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


def skip_compiler_import() -> None:
    """Install the stand-in for `torch._dynamo`, unless that is imported already. Call it before the first optimizer and
    before DDP."""
    sys.modules.setdefault(_COMPILER, _UnusedCompiler())
