"""Loads a configuration from a preset, a TOML file and key=value settings, and writes it as TOML.

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
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dist_train.command_line import check_path, is_text
from dist_train.config.earlier import of_this_version
from dist_train.config.settings import Config, Effect, OptimConfig
from dist_train.config.trees import leaves
from dist_train.errors import UserError, damaged, unreadable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "config.toml"  # of a run folder
PRESETS = Path(__file__).parent.parent / "presets"
_WIDTH = 100  # columns of the reference
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's names
_LONGEST = 2**63  # whole numbers in TOML have 64 bits
_SHOWN = 60  # the most characters of a value in a message


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(preset: str | None, file: Path | None, settings: list[str]) -> Config:
    """Resolve a configuration. settings: `key=value` with dotted keys; a key's last part alone is enough where it is
    unambiguous. Raises UserError for anything unknown, ill-typed or out of range, or that does not fit together."""
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise UserError(f"--preset {preset}: there is no such preset{_nearest(preset, presets())}")
        tree = read_toml(PRESETS / f"{preset}.toml")
    if file is not None:
        own = read_toml(file)
        tree = _merge(tree, of_this_version(own) if file.name == FILE else own)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"{setting}: settings are written key=value, for example train.epochs=4")
        if not text.strip():
            raise UserError(f"{setting}: an empty value; give one, remove the setting, or write {key.strip()}='\"\"'")
        _assign(tree, _full_key(key.strip()), _value(text.strip()), setting)
    return _checked(tree)


def given(file: Path | None, settings: list[str]) -> list[str]:
    """The dotted keys of the settings in a file and on the command line, but not of a run's own file, which has all.
    Raises UserError."""
    keys = [_full_key(setting.partition("=")[0].strip()) for setting in settings]
    return keys if file is None or file.name == FILE else [*keys, *(key for key, _ in leaves(read_toml(file)))]


def parse(text: str) -> Config:
    """The configuration of a text that `to_toml` wrote, of this or an earlier version. Raises UserError, and ValueError
    for a text that is no TOML."""
    return _checked(of_this_version(_toml(text)))


def _toml(text: str) -> dict[str, Any]:
    """Raises ValueError."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _checked(tree: dict[str, Any]) -> Config:
    _check_values(tree)
    try:
        # as JSON: for Python objects, pydantic's strict validation does not accept a dict for a dataclass
        config = TypeAdapter(Config).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(_sentence(error)) from None
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    """Raises UserError for settings that are valid one by one, but not together."""
    batch_size, microbatches = config.train.batch_size, config.train.microbatches
    if batch_size % microbatches:
        raise UserError(
            f"train.batch_size = {batch_size} does not split into train.microbatches = {microbatches} equal parts; "
            f"use {batch_size // microbatches * microbatches or microbatches}"
        )
    for kind in ("norms", "mixing", "output", "stem"):  # all parameters but kernels
        if config.optim.group(kind)["algorithm"] == "muon":
            raise UserError(
                f"optim.{kind}.algorithm = muon: it is for kernels only; set optim.kernels.algorithm=muon, and "
                f"another one for optim.{kind} or optim.default"
            )


def _check_values(tree: dict[str, Any]) -> None:
    """Raises UserError for values that cannot be written as JSON or TOML."""
    try:
        values = [*leaves(tree)]
    except RecursionError:
        raise UserError("the settings are nested more deeply than any setting; correct their names") from None
    for name, value in values:
        if isinstance(value, int) and not -_LONGEST <= value < _LONGEST:
            raise UserError(f"{name}: a whole number has at most 64 bits; use a smaller one")
        words = f"{name}{value if isinstance(value, str) else ''}"
        if "\0" in words or not is_text(words):
            raise UserError(f"{name} = {value}: not valid text; settings are UTF-8, without zero bytes")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dicts and lists."""
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load` reads back to the same configuration."""
    return tomli_w.dumps(_without_none(to_dict(config)))


def reference() -> str:
    """The help text of all settings by section: what each does, its unit and its default, 100 columns wide."""
    about = (
        "Settings that do not change the weights and those that may change bits are marked; a resumed run may change "
        "them, and no others. The items of a list are numbered; 0 stands for the first."
    )
    text, shown = [*textwrap.wrap(about, _WIDTH), ""], dict[Any, str]()
    for key, table, words in _sections(Config):
        title = re.sub(r"\.0\b", "", key)
        title = f"[[{title}]]" if key.endswith(".0") else f"[{title}]"
        same = f"Settings as in {shown[table]}." if table in shown else ""
        text += [title, *textwrap.wrap(f"{words} {same}" if same else f"{table.__doc__} {words}", _WIDTH), ""]
        if not same:
            shown[table] = title
            text += [*_settings(table, key), ""]
    return "\n".join(text)


def _sections(table: Any, key: str = "") -> Iterator[tuple[str, Any, str]]:
    """The sections of a dataclass, also nested ones: (key, dataclass, description of the field) of each."""
    for name, info in table.__pydantic_fields__.items():
        single = dataclasses.is_dataclass(info.annotation)
        for inner in _tables(info.annotation):
            place = _joined(key, name if single else f"{name}.0")
            yield place, inner, _words(info) if single else ""
            yield from _sections(inner, place)


def _settings(table: Any, key: str) -> list[str]:
    """Lines of the help text that describe the settings of a section."""
    defaults = OptimConfig().group("default") if key == "optim.default" else {}
    indent = " " * 6
    lines = []
    for name, info in table.__pydantic_fields__.items():
        if dataclasses.is_dataclass(info.annotation):
            continue
        value = defaults.get(name, info.get_default(call_default_factory=True))
        if info.is_required():
            shown = " (required)"
        elif value is None:
            shown = " (not set)"
        else:
            shown = f"={value if isinstance(value, str) and value else json.dumps(value)}"
        lines.append(f"  {_joined(key, name)}{shown}")
        lines += textwrap.wrap(_words(info), _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return lines


def _words(info: FieldInfo) -> str:
    """The description of a field: the docstring below it, and the words of its mark."""
    marks = [f"{mark.words[0].upper()}{mark.words[1:]}." for mark in info.metadata if isinstance(mark, Effect)]
    return " ".join([*(info.description or "").split(), *marks])


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _effects(table: Any = Config, key: str = "") -> dict[str, Effect]:
    """The marked settings and sections by their dotted names."""
    effects: dict[str, Effect] = {}
    for name, info in table.__pydantic_fields__.items():
        place = _joined(key, name)
        effects.update((place, mark) for mark in info.metadata if isinstance(mark, Effect))
        if dataclasses.is_dataclass(info.annotation):
            effects.update(_effects(info.annotation, place))
    return effects


_EFFECTS = _effects()


def digest(config: Config) -> str:
    """Eight hexadecimal digits, a SHA-256 of the settings that the final weights depend on."""
    text = json.dumps(_binding(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def difference(first: Config, second: Config) -> list[str]:
    """Dotted keys, among those that the final weights depend on, in which two configurations differ."""
    a, b = (dict(leaves(_binding(to_dict(config)))) for config in (first, second))
    return sorted(key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...))


def read_run(path: Path, remedy: str) -> Config:
    """The configuration in the file of a run. remedy: what to do but restore the file. Raises UserError."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error, remedy) from None
    except ValueError as error:  # of a UserError too, the remedy is dropped: nobody wrote this file by hand
        raise damaged(path, str(error).partition(";")[0], remedy) from None


def check_folder(run_dir: Path, settings: Config) -> None:
    """Raises UserError when a run folder belongs to a run with other settings that the final weights depend on, and
    OSError when the folder cannot be read or created."""
    check_path("--run-dir", run_dir)
    path = run_dir / FILE
    if path.exists():
        if differing := [
            key for key in difference(settings, read_run(path, "name another --run-dir")) if key not in _EFFECTS
        ]:
            raise UserError(
                f"--run-dir {run_dir} belongs to a run with another {', '.join(differing)}; "
                f"give the settings it was started with, or another folder"
            )
        return
    existing = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))


def _binding(tree: dict[str, Any], key: str = "") -> dict[str, Any]:
    """The settings that are part of the digest."""
    bound = {}
    for name, value in tree.items():
        place = _joined(key, name)
        if place not in _EFFECTS or _EFFECTS[place].in_digest:
            bound[name] = _binding(value, place) if isinstance(value, dict) else value
    return bound


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def read_toml(path: Path, option: str = "--config ") -> dict[str, Any]:
    """The content of a TOML file. option: by which the file is named on the command line. Raises UserError."""
    try:
        return _toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option}{path}: cannot be read ({error.strerror}); name a TOML file") from None
    except ValueError as error:  # also where a number has thousands of digits
        raise UserError(f"{path}: not valid TOML ({error}); fix that line") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` overridden by `over`: tables are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(typing.cast(dict[str, Any], old), value) if both else value
    return merged


def _value(text: str) -> Any:
    """The value of a setting on the command line: as in TOML, or the text itself, which needs no quotes."""
    try:
        tree = _toml(f"x = {text}")
    except ValueError:  # also where a number has thousands of digits
        tree = {}
    return tree["x"] if [*tree] == ["x"] else {"True": True, "False": False}.get(text, text)


def _assign(tree: dict[str, Any], key: str, value: Any, setting: str) -> None:
    """Set a dotted key in a tree. Raises UserError, which quotes `setting`."""
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        if isinstance(node, list):
            position = _position(part, node)
            node = None if position is None else node[position]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and (position := _position(last, node)) is not None:
        node[position] = value
    else:
        raise UserError(f"{setting}: there is nothing at {key}; list items count from 0")


def _position(part: str, items: list[Any]) -> int | None:
    """The position in a list that a part of a key names, None for any other part."""
    return int(part) if re.fullmatch("[0-9]{1,9}", part) and int(part) < len(items) else None


def _tables(kind: Any) -> list[Any]:
    """The dataclasses in a type: itself, or those of a list's items or of a union's alternatives."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [kind]
    return [table for argument in typing.get_args(kind) for table in _tables(argument)]


def _fields(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _leaves(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings that are not in a list."""
    names = []
    for name, kind in _fields(cls).items():
        table = kind if dataclasses.is_dataclass(kind) else None
        names += _leaves(table, f"{prefix}{name}.") if table else [prefix + name]
    return names


def _full_key(key: str) -> str:
    """The dotted key of a setting that may be given by its last part alone. Raises UserError."""
    if "." in key or key in _fields(Config):
        return key
    matches = [name for name in _leaves(Config) if name.rpartition(".")[2] == key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{key}: this could be {' or '.join(matches)}; write out which")
    leaves = _leaves(Config)
    close = _similar(key, [name.rpartition(".")[2] for name in leaves])
    near = next((name for name in leaves if name.rpartition(".")[2] == close), None)
    more = f"did you mean {near}?" if near else "dist-train train --help lists all"
    raise UserError(f"{key or repr(key)}: there is no such setting; {more}")


def _similar(name: str, valid: list[str]) -> str | None:
    """The valid name that an unknown one was probably meant to be: a word of one begins with the other (`decay` and
    `weight_decay`), or else the spelling is close."""
    longer = [each for each in valid if name and (f"_{name}" in f"_{each}" or name.startswith(each))]
    longer.sort(key=lambda each: not each.startswith(name))
    return next(iter(longer or difflib.get_close_matches(name, valid, 1, 0.7)), None)


def _nearest(name: str, valid: list[str]) -> str:
    """The end of a message about an unknown name: a similar valid one, or all valid ones."""
    close = _similar(name, valid)
    return f"; did you mean {close}?" if close else f"; there are {', '.join(valid)}"


def _sentence(error: ValidationError) -> str:
    """The first error of pydantic as one sentence; a wrong name, which explains a missing setting, before others."""
    first = min(error.errors(), key=lambda each: each["type"] not in _UNKNOWN)
    # find the dotted key: `loc` also holds pydantic's tags for the alternatives of a union
    kind: Any = Config
    path: list[str] = []
    for part in first["loc"]:
        tables = _tables(kind)
        if isinstance(part, int):
            path.append(str(part))
        elif any(part in _fields(table) for table in tables):
            path.append(part)
            kind = next(_fields(table)[part] for table in tables if part in _fields(table))
        elif first["type"] in _UNKNOWN:
            valid = sorted(name for table in tables for name in _fields(table))
            where = ".".join([*path, str(part)])
            return f"{where}: there is no such setting{_nearest(str(part), valid)}"
    key = ".".join(path)
    if first["type"] in ("missing", "missing_argument"):
        remedy = "give a --preset or a --config that has it" if key == "model" else "give it a value"
        return f"{key}: this setting is missing; {remedy}"
    value = first["input"]
    shown = json.dumps(value) if isinstance(value, (str, bool, int)) else type(value).__name__
    shown = repr(value) if isinstance(value, float) else shown  # inf and nan as in TOML
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    return f"{key} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]}"
