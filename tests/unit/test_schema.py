"""The schema: every field is documented, sections are closed, and sets of values that clash are refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from hpctrain.config.schema import Config
from hpctrain.config.section import Section

RESNET = {"model": {"name": "resnet18"}}


def sections(section: type[Section]) -> set[type[Section]]:
    found = {section}
    for field in section.model_fields.values():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                found |= sections(candidate)
    return found


def test_every_value_says_what_it_is() -> None:
    silent = [
        f"{section.__name__}.{key}"
        for section in sections(Config)
        for key, field in section.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert silent == []


def test_a_configuration_cannot_be_changed() -> None:
    config = Config.model_validate(RESNET)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"optimizer": {"name": "adam", "nesterov": True}}, "set nesterov to false or name to sgd"),
        ({"optimizer": {"nesterov": True, "momentum": 0.0}}, "nesterov needs momentum, which is 0"),
        ({"data": {"crop_area": [0.5, 0.1]}}, "crop_area is [0.5, 0.1], but shares of the area rise"),
        ({"data": {"crop_area": [0.5, 1.5]}}, "end at 1 at most"),
        ({"data": {"crop_aspect": [2.0, 1.0]}}, "put the smaller aspect first"),
        ({"data": {"loader": "torch", "decode": "gpu"}}, "decode=gpu needs DALI, but loader is torch"),
        ({"data": {"decode": "gpu"}, "train": {"device": "cpu"}}, "data.decode=gpu needs a GPU"),
        ({"data": {"builtin": "digits"}}, "builtin=digits makes its set at path, which is not set"),
        ({"train": {"target_accuracy": 0.9, "eval_every_epochs": None}}, "target_accuracy waits for evaluations"),
        ({"train": {"early_stopping": {}, "eval_every_epochs": "none"}}, "set it, or leave early_stopping out"),
        ({"schedule": {"milestones": [30, 20]}}, "milestones are [30.0, 20.0], but must rise"),
        ({"schedule": {"kind": "step", "warmup_epochs": 40}}, "lies within the warm-up of 40 epochs"),
        ({"schedule": {"final_lr": 1.0}}, "final_lr is 1, above lr (0.1), but cosine falls"),
        (
            {"checkpoint": {"every_steps": 10, "mtbf_hours": 24.0}},
            "every_steps is 10 and mtbf_hours is 24, but only",
        ),
        ({"launch": {"signals": ["USR1", "TERM", "USR1"]}}, "signals names USR1 2 times: name it once"),
        ({"schedule": {"warmup_epochs": 91}}, "longer than the training of 90 epochs"),
    ],
)
def test_clashing_values_are_refused_with_the_remedy(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**RESNET, **given})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("value", ["3", True, 3.0, 0, None])
def test_numbers_are_not_guessed_from_other_types(value: object) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({**RESNET, "train": {"epochs": value}})


def test_none_is_null_only_where_null_may_stand() -> None:
    config = Config.model_validate({**RESNET, "train": {"max_steps": "none"}, "gradients": {"compression": "none"}})
    assert config.train.max_steps is None
    assert config.gradients.compression == "none"
