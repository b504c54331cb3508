"""Every key of the configuration with what it takes, its default and its meaning, as the schema itself tells them.

It is what `hpctrain config` prints; nothing is written down a second time for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.config.schema import Config
from hpctrain.errors import UserError

_Schema = Mapping[str, Any]
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_NAMES = {"boolean": "true | false", "null": "none", "string": "text"}


@dataclass(frozen=True, slots=True)
class Key:
    """A key with its sections' names before it; ``default`` is as ``--set`` takes it, or None where one is required."""

    name: str
    takes: str
    default: str | None
    meaning: str


@dataclass(frozen=True, slots=True)
class Part:
    """The keys of a section of the configuration. ``model`` has two, of which a run takes one."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def describe(section: str | None = None) -> list[Part]:
    """The parts of ``section``, or all of them. Raises UserError where there is no such section."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    own = tuple(_key(name, field) for name, field in schema["properties"].items() if not _below(field, definitions))
    parts = [Part("", "", own)] + [
        Part(name, " ".join(below["description"].split()), tuple(_keys(below, definitions, f"{name}.")))
        for name, field in schema["properties"].items()
        for below in _below(field, definitions)
    ]
    if section is None:
        return parts
    if not (found := [part for part in parts if part.name == section]):
        known = ", ".join(dict.fromkeys(part.name for part in parts if part.name))
        raise UserError(f"the configuration has no section {section!r}: name one of {known}, or none for all of them")
    return found


def to_text(parts: list[Part], width: int) -> str:
    """``parts`` as lines of at most ``width`` columns, unless a word is longer."""
    lines: list[str] = []
    for part in parts:
        if part.name:
            lines += ["", *_wrapped(f"{part.name}: {part.meaning}", width, "", "")]
        for key in part.keys:
            default = "... (required)" if key.default is None else key.default
            lines += _wrapped(f"{key.name}={default}  ({key.takes})", width, "  ", "        ")
            lines += _wrapped(key.meaning, width, "      ", "      ")
    return "\n".join(lines).lstrip("\n")


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _below(field: _Schema, definitions: _Schema) -> list[_Schema]:
    """The sections that ``field`` may hold; none for a field that holds a value."""
    choices = [field, *field.get("oneOf", ()), *field.get("anyOf", ())]
    return [definitions[choice["$ref"].rpartition("/")[2]] for choice in choices if "$ref" in choice]


def _keys(section: _Schema, definitions: _Schema, prefix: str) -> Iterator[Key]:
    for name, field in section["properties"].items():
        below = _below(field, definitions)
        # A section that may be left out is a key too.
        if not below or "anyOf" in field:
            yield _key(prefix + name, field)
        for section_below in below:
            yield from _keys(section_below, definitions, f"{prefix}{name}.")


def _key(name: str, field: _Schema) -> Key:
    default = _text(field["default"]) if "default" in field else None
    return Key(name, _takes(field), default, " ".join(field.get("description", "").split()))


def _takes(field: _Schema) -> str:
    if "anyOf" in field:
        return " | ".join(map(_takes, field["anyOf"]))
    if "const" in field or "enum" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if "$ref" in field:
        return "a section"
    if "prefixItems" in field:
        return f"[{', '.join(map(_takes, field['prefixItems']))}]"
    if "items" in field:
        return f"[{_takes(field['items'])}, ...]"
    bounds = [f"{sign} {field[bound]:.12g}" for bound, sign in _BOUNDS.items() if bound in field]
    kind: str = field["type"]
    return f"{_NAMES.get(kind, kind)} {' and '.join(bounds)}".rstrip()


def _text(value: Any) -> str:
    """``value`` as YAML in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)
