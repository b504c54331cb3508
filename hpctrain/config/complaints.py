"""What pydantic found wrong, as one sentence each: the key, where it was written, and what would be right."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from hpctrain.config.schema import Config, DenseConfig, ResNetConfig

Places = Mapping[tuple[str, ...], str]
_MODELS: dict[str, type[BaseModel]] = {
    name: section
    for section in (DenseConfig, ResNetConfig)
    for name in get_args(section.model_fields["name"].annotation)
}


def complaints(errors: list[ErrorDetails], places: Places, fallback: str) -> Iterator[str]:
    """One line an error; ``places`` tells where a key was written, ``fallback`` where a missing one belongs."""
    for error in errors:
        path = tuple(part for part in error["loc"] if not _is_model_tag(error["loc"], part))
        if error["type"].startswith("union_tag"):
            path = (*path, "name")
        place = _place(path, places) or fallback
        yield from _sentences(error, path, place)


def _is_model_tag(loc: tuple[int | str, ...], part: int | str) -> bool:
    """Pydantic puts the name of the chosen model between `model` and its key."""
    return len(loc) > 1 and loc[0] == "model" and part == loc[1] and part in _MODELS


def _place(path: tuple[int | str, ...], places: Places) -> str | None:
    names = tuple(str(part) for part in path)
    return next((places[names[:n]] for n in range(len(names), 0, -1) if names[:n] in places), None)


def _sentences(error: ErrorDetails, path: tuple[int | str, ...], place: str) -> Iterator[str]:
    key = ".".join(str(part) for part in path)
    kind, given = error["type"], json.dumps(error["input"], default=str)
    if kind == "value_error":
        prefix = f"{key}: " if key else ""
        yield from (f"{prefix}{sentence}." for sentence in str(error["ctx"]["error"]).splitlines())
    elif kind in ("extra_forbidden", "invalid_key"):
        yield _unknown_key(tuple(map(str, path)), error, place)
    elif kind == "missing":
        yield f"{key} is missing in {place}."
    elif kind == "union_tag_not_found":
        yield f"{key} is missing in {place}; it is one of {', '.join(_MODELS)}."
    elif kind == "union_tag_invalid":
        yield f"{key} is {json.dumps(error['ctx']['tag'])} ({place}), but must be one of {', '.join(_MODELS)}."
    elif kind in ("model_type", "model_attributes_type"):
        yield f"{key} is {given} ({place}), but must be a section of keys."
    else:
        yield f"{key} is {given} ({place}), but {_requirement(error['msg'])}."


_PLAIN = {
    "Input should be": "must be",
    "Tuple should have": "must have",
    " after validation": "",
    "a valid tuple": "a list",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid ": "a ",
}


def _requirement(message: str) -> str:
    """Pydantic's sentence about a value, in the words of this program."""
    for theirs, ours in _PLAIN.items():
        message = message.replace(theirs, ours)
    return message


def _unknown_key(path: tuple[str, ...], error: ErrorDetails, place: str) -> str:
    key = ".".join(path)
    if path[0] == "model" and any(path[1] in section.model_fields for section in _MODELS.values()):
        name = error["loc"][1]
        return (
            f"{key} ({place}) is no key of the model {name}: leave it out, "
            f"or give the section whole with --set 'model={{name: {name}}}'."
        )
    known = dict.fromkeys(_keys(Config, str(error["loc"][1]) if path[0] == "model" else ""))
    siblings = [candidate for candidate in known if candidate.rpartition(".")[0] == ".".join(path[:-1])]
    nearest = _nearest(path[-1], siblings) or _nearest(path[-1], list(known))
    remedy = (
        f"did you mean {nearest}?"
        if nearest
        else f"known here: {', '.join(siblings) or ', '.join(Config.model_fields)}."
    )
    return f"{key} ({place}) is an unknown key; {remedy}"


def _nearest(name: str, candidates: list[str]) -> str | None:
    """The candidate whose last part is most like ``name``, if any is."""
    last = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    found = difflib.get_close_matches(name, last, n=1)
    return last[found[0]] if found else None


def _keys(section: type[BaseModel], model: str, prefix: str = "") -> Iterator[str]:
    """Every dotted key there is; of the models, those of ``model`` alone (of all of them without one)."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for candidate in (field.annotation, *get_args(field.annotation)):
            if not (isinstance(candidate, type) and issubclass(candidate, BaseModel)):
                continue
            if candidate in _MODELS.values() and model and candidate is not _MODELS[model]:
                continue
            yield from _keys(candidate, model, f"{prefix}{name}.")
