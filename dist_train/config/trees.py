"""Nested dicts and lists by dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists with its dotted name, in order. name: prefix of all names."""
    if isinstance(tree, (dict, list)):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree
