"""Configurations that earlier versions wrote into run folders and checkpoints."""

from __future__ import annotations

from typing import Any

_REMOVED = ("model.batch_norm.momentum",)  # none changed the weights
# Until 0.1.0 phases of a run were in epochs; now they are in fractions of the run.
_IN_EPOCHS = {"from_epoch": "start", "until_epoch": "until"}


def of_this_version(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings by this version's names and in its units; the tree is changed. What is not understood stays."""
    for key in _REMOVED:
        table, _, name = key.rpartition(".")
        _table(tree, table).pop(name, None)
    epochs = _table(tree, "train").get("epochs")
    if isinstance(epochs, (int, float)) and epochs > 0:
        data, groups = _table(tree, "data"), _table(tree, "optim").values()
        sizes = data.get("smaller")
        sizes = [size for size in sizes if isinstance(size, dict)] if isinstance(sizes, list) else []
        for table in (*sizes, *(group for group in groups if isinstance(group, dict)), _table(tree, "train.select")):
            for old, new in _IN_EPOCHS.items():
                if isinstance(table.get(old), (int, float)):
                    table[new] = min(1.0, table.pop(old) / epochs)
        # of the sizes that would have lasted beyond the end of the run, the run had only the first
        for number, size in enumerate(sizes):
            if size.get("until") == 1:
                data["smaller"] = sizes[: number + 1]
                break
    return tree


def _table(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The table of a dotted key, an empty one where there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}
