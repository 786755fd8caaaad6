"""Configuration: typed settings, presets, TOML, key=value."""

from dist_train.config.loading import (
    PRESETS,
    check_folder,
    difference,
    digest,
    given,
    load,
    parse,
    presets,
    read_run,
    read_toml,
    reference,
    to_dict,
    to_toml,
)
from dist_train.config.settings import Config

__all__ = [
    "PRESETS",
    "Config",
    "check_folder",
    "difference",
    "digest",
    "given",
    "load",
    "parse",
    "presets",
    "read_run",
    "read_toml",
    "reference",
    "to_dict",
    "to_toml",
]
