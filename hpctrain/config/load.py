"""From YAML files and ``--set`` arguments to a validated ``Config``, and back.

Reads no data and imports no torch. Whatever is wrong is told at once, one line each, with the place where it
was written; nothing is guessed or dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hpctrain.config.complaints import complaints
from hpctrain.config.dialect import dump_yaml, parse_yaml
from hpctrain.config.schema import Config
from hpctrain.errors import UserError

#: Keys that change how a run is carried out or told, not what it computes; `config_hash` leaves them out. Data
#: may move (data.path), and the engine is part of the record beside the hash.
NOT_HASHED = (
    "log",
    "comm",
    "checkpoint",
    "launch",
    "data.path",
    "data.threads",
    "data.log_samples",
    "gradients.check_every_steps",
)


@dataclass
class _Layers:
    """Values merged so far, and for each key where it was last written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)

    def merge(self, new: Mapping[str, Any], place: str) -> None:
        """Lay ``new`` over the values: mappings merge key by key, anything else replaces."""
        _merge(self.values, new, place, self.places, ())

    def assign(self, key: str, value: Any, place: str) -> None:
        """Put ``value`` (a mapping too) in the place of whatever stood at the dotted ``key``."""
        *parents, last = key.split(".")
        section = self.values
        for depth, parent in enumerate(parents):
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
                self.places[tuple(parents[: depth + 1])] = place
            section = section[parent]
        section[last] = value
        here = (*parents, last)
        self.places = {path: told for path, told in self.places.items() if path[: len(here)] != here}
        self.places[here] = place


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file ``path``, with ``overrides`` of the form ``a.b=value`` laid over it.

    Without a file the defaults stand where the overrides say nothing.

    ``extends: other.yaml`` (relative to the file that says it) is read first and the file laid over it. A value
    of an override is YAML and replaces what stood there, whole sections too.

    Raises UserError, with one line for each thing that is wrong.
    """
    layers = _Layers()
    files = _files(Path(path)) if path is not None else ()
    for place, values in reversed(list(files)):
        layers.merge(values, str(place))
    for override in overrides:
        key, value = _parse_override(override)
        layers.assign(key, value, f"--set {override}")
    try:
        return Config.model_validate(layers.values)
    except ValidationError as error:
        raise UserError("\n".join(complaints(error.errors(), layers.places, str(path or "the command line")))) from None


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, defaults included; loads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def config_hash(config: Config) -> str:
    """SHA-256 (hex) over all values that decide the result of a run; see `NOT_HASHED` for the others."""
    values = config.model_dump(mode="json")
    for key in NOT_HASHED:
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        del section[last]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """``path`` and the files it extends, nearest first, each with its values."""
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise UserError(f"{path} extends itself by way of {' and '.join(map(str, seen))}: break the circle.")
        seen.append(path.resolve())
        values = _read(path)
        base = values.pop("extends", None)
        if base is not None and not isinstance(base, str):
            raise UserError(f"{path}: extends must name one file, but is {base!r}.")
        yield path, values
        if base is None:
            return
        path = path.parent / base


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The configuration file {path} cannot be read: {reason}.") from None
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_where(error)}.") from None
    if values is None:
        raise UserError(f"{path} is empty: it needs at least `model: {{name: ...}}` or `extends: FILE`.")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, but its top level is a {type(values).__name__}.")
    return values


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: write it as section.key=value.")
    try:
        return key, parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {_where(error)}.") from None


def _where(error: yaml.YAMLError) -> str:
    """What the parser found, and in which line (counted from 1)."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', '')} {problem}"
    return f"{problem} in line {mark.line + 1}" if mark else problem


def _merge(
    old: dict[str, Any], new: Mapping[str, Any], place: str, places: dict[tuple[str, ...], str], at: tuple[str, ...]
) -> None:
    for key, value in new.items():
        here = (*at, str(key))
        places[here] = place
        if isinstance(value, dict):
            below = old.get(key)
            old[key] = dict(below) if isinstance(below, dict) else {}
            _merge(old[key], value, place, places, here)
        else:
            old[key] = value
