"""A stand-in for `torch._dynamo`, so that a run which compiles nothing does not import torch's compiler.

torch's optimizers and DDP import it at their first use: 900 modules, 1.0 to 1.5 s of CPU time on every rank (torch 2.9,
2.14 and 2.15 on two cores of a Xeon), half as much as importing torch itself. No setting of torch's avoids it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

_COMPILER = "torch._dynamo"


class _UnusedCompiler(ModuleType):
    """Stands for `torch._dynamo`, answers what optimizers and DDP ask of it when nothing is compiled, and gives way
    to the real one as soon as anything else is asked."""

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
        """What marks a function as not to be compiled."""
        return function

    @staticmethod
    def graph_break(**_: Any) -> None:
        """What ends a compiled part."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked by whoever looks through all modules
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


def skip_compiler_import() -> None:
    """Put the stand-in in place of `torch._dynamo`, unless that is imported already. To be called before optimizers and
    DDP are made."""
    sys.modules.setdefault(_COMPILER, _UnusedCompiler())
