"""hpctrain config: every key of the schema, with a default that can be typed and a meaning."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import BaseModel

from hpctrain.config.describe import Key, describe, to_text
from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from tests.unit.small_runs import command

KEYS = [key for part in describe() for key in part.keys]


def sections_of(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, types.UnionType):
        for part in get_args(annotation):
            yield from sections_of(part)


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the models themselves, whatever their JSON schema says."""
    for name, field in section.model_fields.items():
        below = list(sections_of(field.annotation))
        if not below:
            yield prefix + name
        for one in below:
            yield from fields_of(one, f"{prefix}{name}.")


def test_every_field_of_the_schema_is_told() -> None:
    asked = set(fields_of(Config))
    assert {"seed", "model.neurons", "model.zero_gamma", "comm.horovod.cycle_time_ms", "train.epochs"} < asked
    assert asked - {key.name for key in KEYS} == set()
    text = to_text(describe(), 80)
    assert [name for name in asked if f"\n  {name}=" not in f"\n{text}"] == []


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_key_has_a_meaning_and_a_default_that_can_be_typed(key: Key) -> None:
    assert key.meaning and key.takes
    if key.default is None:
        assert key.name == "model.name"
        return
    net = "dense" if key in describe("model")[0].keys else "resnet20"
    plain = load_config(None, [f"model.name={net}"])
    typed = load_config(None, [f"model.name={net}", f"{key.name}={key.default}"])
    optional = key.name.startswith("train.early_stopping.")
    assert typed == (plain if not optional else load_config(None, [f"model.name={net}", "train.early_stopping={}"]))


def test_it_fits_80_columns_where_there_is_no_terminal() -> None:
    done = command("config")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\n  train.epochs=90  (integer > 0)\n" in done.out


def test_one_section_alone() -> None:
    lines = command("config", "launch").out.splitlines()
    assert lines[0] == "launch: Preemption, time limits and requeues."
    assert [line for line in lines[1:] if line[2] != " "] and all(line.startswith("  ") for line in lines[1:])
    assert "  launch.slow_node=warn  (warn | stop)" in lines


def test_no_such_section() -> None:
    done = command("config", "lauch")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("hpctrain: the configuration has no section 'lauch': name one of model, data, train, ")
    assert done.err.count("\n") == 1
