"""Distributed training of block networks, with the same weights, bit for bit, on any number of workers.

    from dist_train import load

    network = load("runs/block94-seed0-1a2b3c4d")
    network.predict("cat.png")  # [[("cat", 0.98), ("dog", 0.01), ...]]

is all there is to a trained network; training is `dist-train train`.
"""

__version__ = "0.2.0.dev0"

from typing import TYPE_CHECKING, Any

from dist_train import signals as signals  # notes the launcher before the imports that take seconds

if TYPE_CHECKING:
    from dist_train.inference.trained_network import TrainedNetwork as TrainedNetwork
    from dist_train.inference.trained_network import load as load
    from dist_train.inference.trained_network import predict as predict


def __getattr__(name: str) -> Any:
    """The names that need torch, imported when they are first used."""
    if name in ("TrainedNetwork", "load", "predict"):
        from dist_train.inference import trained_network

        return getattr(trained_network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
