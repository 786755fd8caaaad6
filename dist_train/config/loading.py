"""A configuration from a preset, a TOML file and key=value settings, and back to TOML.

Later sources override earlier ones: defaults, preset, file, command line. The resolved configuration of a run is
written to its run folder as `config.toml` and is enough to repeat the run.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import hashlib
import json
import os
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from dist_train.config.settings import DRIFTING, FREE, Block, Config, Convolution, Group, ModelConfig
from dist_train.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent.parent / "presets"

_REQUIRED = ("channels", "convolutions")  # of a block


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(preset: str | None, file: Path | None, settings: list[str]) -> Config:
    """Resolve a configuration. settings: `key=value` with dotted keys; a key's last part alone will do where
    it is unambiguous. Raises UserError for anything unknown, ill-typed or out of range."""
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise UserError(f"--preset {preset}: there is no such preset{_nearest(preset, presets())}")
        tree = _read(PRESETS / f"{preset}.toml")
    if file is not None:
        tree = _merge(tree, _read(file))
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found:
            raise UserError(f"{setting}: settings are written key=value, for example train.epochs=4")
        _assign(tree, _full_key(key.strip()), _value(text.strip()), setting)
    return _checked(tree)


def parse(text: str) -> Config:
    """What `to_toml` wrote. Raises UserError, or tomllib.TOMLDecodeError."""
    return _checked(tomllib.loads(text))


def _checked(tree: dict[str, Any]) -> Config:
    try:
        # as JSON: only there does strict validation take tables for dataclasses
        return TypeAdapter(Config).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dicts and lists."""
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load` reads back to the same configuration."""
    return tomli_w.dumps(_without_none(to_dict(config)))


def reference() -> str:
    """All settings by section, with what its module says of it and the defaults, as text."""
    convolution = Convolution()
    block = Block(channels=1, convolutions=[convolution])
    settings = Config(ModelConfig([block]))
    tree = to_dict(settings)
    del tree["model"]["blocks"]
    sections = [(f"[{name}]", name, _fields(Config)[name], values) for name, values in tree.items()]
    of_block = {name: value for name, value in dataclasses.asdict(block).items() if name not in _REQUIRED}
    sections[1:1] = [
        ("[[model.blocks]]", "", Block, of_block),
        ("each of its convolutions:", "", Convolution, dataclasses.asdict(convolution)),
    ]
    place = [name for _, name, *_ in sections].index("optim") + 1
    sections.insert(place, ("[optim.default]", "optim.default", Group, settings.optim.group("default")))
    text = []
    for title, prefix, kind, values in sections:
        described = {name: field.description for name, field in kind.__pydantic_fields__.items() if field.description}
        said = " ".join([*(kind.__doc__ or "").split(), *(f"{name}: {words}" for name, words in described.items())])
        flat = _lines(_without_none(values), prefix)
        text.append(textwrap.fill(f"{title} {said}", 100))
        text.append(textwrap.fill("  ".join(flat), 100, initial_indent="    ", subsequent_indent="    ") + "\n")
    return "\n".join(text)


def _lines(tree: dict[str, Any], prefix: str) -> list[str]:
    """`key=value` with dotted keys, as the command line takes them."""
    found = []
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            found += _lines(value, key)
        else:
            shown = value if isinstance(value, str) and value else json.dumps(value)
            found.append(f"{key}={shown}")
    return found


def digest(config: Config) -> str:
    """Eight hexadecimal digits that name what the final weights depend on."""
    text = json.dumps(_binding(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def difference(mine: Config, other: Config) -> list[str]:
    """Dotted keys, among those the final weights depend on, in which two configurations differ."""
    a, b = (_flat(_binding(to_dict(config))) for config in (mine, other))
    return sorted(key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...))


def check_folder(run_dir: Path, settings: Config) -> None:
    """Raises UserError when a run folder belongs to a run with other settings that the final weights depend on, and
    OSError when it cannot be read, or cannot be made."""
    path = run_dir / "config.toml"
    if path.exists():
        if differing := set(difference(settings, load(None, path, []))) - {*DRIFTING}:
            raise UserError(
                f"--run-dir {run_dir} belongs to a run with another {', '.join(sorted(differing))}; "
                f"give the settings it was started with, or another folder"
            )
        return
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))


def _binding(tree: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for section, values in tree.items():
        if section not in FREE:
            kept[section] = {key: value for key, value in values.items() if f"{section}.{key}" not in FREE}
    return kept


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{prefix}.{index}", item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for name, item in pairs for key, leaf in _flat(item, name).items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error}); mend that line") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(typing.cast(dict[str, Any], old), value) if both else value
    return merged


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)


def _assign(tree: dict[str, Any], key: str, value: Any, setting: str) -> None:
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise UserError(f"{setting}: there is nothing at {key}; list items count from 0")


def _tables(kind: Any) -> list[Any]:
    """The dataclasses that a value of this type may hold: its own, its items' or its alternatives'."""
    if dataclasses.is_dataclass(kind):
        return [kind]
    return [found for argument in typing.get_args(kind) for found in _tables(argument)]


def _fields(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _leaves(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that lie under no list."""
    found = []
    for name, kind in _fields(cls).items():
        table = kind if dataclasses.is_dataclass(kind) else None
        found += _leaves(table, f"{prefix}{name}.") if table else [prefix + name]
    return found


def _full_key(key: str) -> str:
    if "." in key or key in _fields(Config):
        return key
    found = [name for name in _leaves(Config) if name.rpartition(".")[2] == key]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{key}: this could be {' or '.join(found)}; write out which")
    leaves = _leaves(Config)
    close = difflib.get_close_matches(key, {name.rpartition(".")[2] for name in leaves}, 1, 0.5)
    near = [name for name in leaves if close and name.rpartition(".")[2] == close[0]]
    raise UserError(f"{key}: there is no such setting{_nearest(key, leaves, near)}")


def _nearest(name: str, valid: list[str], near: list[str] | None = None) -> str:
    near = near or difflib.get_close_matches(name, valid, 1, 0.4)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(valid)}"


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence."""
    first = error.errors()[0]
    # pydantic's own tags for the alternatives of a union are no part of the key
    kind: Any = Config
    path: list[str] = []
    for part in first["loc"]:
        tables = _tables(kind)
        if isinstance(part, int):
            path.append(str(part))
        elif any(part in _fields(table) for table in tables):
            path.append(part)
            kind = next(_fields(table)[part] for table in tables if part in _fields(table))
        elif first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            valid = sorted(name for table in tables for name in _fields(table))
            where = ".".join([*path, str(part)])
            return f"{where}: there is no such setting{_nearest(str(part), valid)}"
    key = ".".join(path)
    if first["type"] in ("missing", "missing_argument"):
        remedy = "give a --preset or a --config that has it" if key == "model" else "give it a value"
        return f"{key}: this setting is missing; {remedy}"
    value = first["input"]
    shown = json.dumps(value) if isinstance(value, (str, bool, int, float)) else type(value).__name__
    return f"{key} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]}"
