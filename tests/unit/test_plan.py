"""The plan's arithmetic, for many sizes, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.config.plan import Plan, make_plan
from hpctrain.config.schema import Config
from hpctrain.errors import UserError


def plan_of(
    sections: dict[str, Any] | None = None,
    *,
    world_size: int = 1,
    num_nodes: int = 1,
    train_samples: int = 1000,
    val_samples: int = 100,
    num_classes: int = 10,
) -> Plan:
    config = Config.model_validate({"model": {"name": "dense"}, **(sections or {})})
    return make_plan(
        config,
        world_size=world_size,
        num_nodes=num_nodes,
        train_samples=train_samples,
        val_samples=val_samples,
        num_classes=num_classes,
    )


@settings(deadline=None)
@given(
    batch=st.integers(1, 9),
    world_size=st.integers(1, 8),
    accumulation=st.integers(1, 3),
    spare=st.integers(0, 300),
    last_batch=st.sampled_from(["drop", "pad"]),
)
def test_every_sample_is_trained_on_dropped_or_padded(
    batch: int, world_size: int, accumulation: int, spare: int, last_batch: str
) -> None:
    train = {"batch_per_worker": batch, "accumulation": accumulation, "last_batch": last_batch, "epochs": 3}
    samples = batch * world_size * accumulation + spare
    plan = plan_of({"train": train}, world_size=world_size, train_samples=samples)
    assert plan.batch_global == batch * world_size * accumulation
    assert plan.steps_per_epoch * plan.batch_global == samples - plan.samples_dropped + plan.samples_padded
    assert min(plan.samples_dropped, plan.samples_padded) == 0
    assert max(plan.samples_dropped, plan.samples_padded) < plan.batch_global
    assert plan.total_steps == 3 * plan.steps_per_epoch
    left = [plan.steps_left_in_epoch(step * plan.batch_global) for step in range(plan.steps_per_epoch + 1)]
    assert left == list(range(plan.steps_per_epoch, -1, -1))


def test_a_position_of_another_global_batch_keeps_the_rule_for_the_last_one() -> None:
    assert plan_of({"train": {"batch_per_worker": 64}}).steps_left_in_epoch(300) == 700 // 64
    padded = plan_of({"train": {"batch_per_worker": 64, "last_batch": "pad"}})
    assert padded.steps_left_in_epoch(300) == math.ceil(700 / 64)
    assert padded.steps_left_in_epoch(1024) == 0


def test_goyals_recipe_becomes_its_published_numbers() -> None:
    """Goyal et al. 2017, section 5.1: 8,192 = 256 x 32, peak 3.2 after 5 epochs from 0.1, falls at 30, 60, 80."""
    schedule = {
        "kind": "step",
        "lr": 0.1,
        "reference_batch": 256,
        "warmup_epochs": 5,
        "warmup_start": 0.1,
        "milestones": [30, 60, 80],
    }
    plan = plan_of(
        {"schedule": schedule, "train": {"batch_per_worker": 32, "epochs": 90}},
        world_size=256,
        num_nodes=32,
        train_samples=1_281_167,
        num_classes=1000,
    )
    assert (plan.batch_global, plan.steps_per_epoch, plan.total_steps) == (8192, 156, 14040)
    assert (plan.lr_start, plan.lr_peak) == (0.1, pytest.approx(3.2))
    assert plan.lr_end == pytest.approx(0.0032)
    assert plan.schedule.warmup_steps == 780
    assert plan.schedule.milestones == (4680, 9360, 12480)


def test_max_steps_ends_a_run_early_without_bending_its_schedule() -> None:
    train = {"batch_per_worker": 10, "epochs": 4}
    whole = plan_of({"train": train})
    short = plan_of({"train": {**train, "max_steps": 7}})
    assert (whole.total_steps, short.total_steps) == (400, 7)
    assert short.schedule == whole.schedule
    assert short.lr_end == whole.schedule.lr_at(6)
    assert plan_of({"train": {**train, "max_steps": 1000}}).total_steps == 400


def test_the_record_has_the_stable_keys_and_is_json() -> None:
    record = plan_of(world_size=2, num_nodes=2).to_record()
    stable = ["world_size", "nodes", "workers", "batch_per_worker", "batch_global", "steps_per_epoch", "epochs"]
    assert [record[key] for key in stable] == [2, 2, 2, 32, 64, 15, 90]
    assert record["samples_dropped"] == 40


def test_the_plan_is_told_in_rows() -> None:
    rows = dict(plan_of({"checkpoint": {"every_steps": 1500}}, world_size=2).describe())
    assert rows["global batch"] == "64"
    assert rows["training samples"] == "1,000 (40 dropped an epoch)"
    assert rows["checkpoints"] == "every 1,500 steps"
    assert rows["learning rate at start, peak, end"].startswith("0.1, 0.1, ")
    padded = dict(plan_of({"train": {"last_batch": "pad"}}).describe())
    assert padded["training samples"] == "1,000 (24 padded an epoch)"
    assert padded["checkpoints"] == "at the end of each epoch"
    rare = dict(plan_of({"checkpoint": {"mtbf_hours": 36}}).describe())
    assert rare["checkpoints"] == "as often as pays with a failure every 36 hours"


def test_the_model_gets_the_larger_number_of_classes() -> None:
    assert plan_of().num_classes == 10
    assert plan_of({"data": {"num_classes": 12}}).num_classes == 12


@pytest.mark.parametrize(
    ("sections", "counts", "sentence"),
    [
        (
            {"train": {"batch_per_worker": 32, "accumulation": 2}},
            {"world_size": 2, "train_samples": 100},
            "The global batch is 128 (train.batch_per_worker 32 x 2 workers x train.accumulation 2), "
            "but the training set has 100 samples: lower train.batch_per_worker or train.accumulation, "
            "or start fewer ranks.",
        ),
        (
            {"parallel": {"virtual_workers": 1024}},
            {"world_size": 2},
            "parallel.virtual_workers is 1024, but this job has 2 ranks and a worker takes a rank of its own: "
            "start 1024 ranks, or leave the key out and set train.accumulation for a larger batch.",
        ),
        (
            {},
            {"val_samples": 0},
            "The data set has no validation samples: give it a folder `val`, set data.val_fraction (0.1, say), "
            "or train.eval_every_epochs=none.",
        ),
        (
            {},
            {"num_classes": 1},
            "The data set has 1 class, but a classifier needs at least 2: add a folder for each class.",
        ),
        (
            {"data": {"num_classes": 9}},
            {},
            "data.num_classes is 9, but the data set has 10 classes: set it to 10, or leave it out.",
        ),
        (
            {"gradients": {"grid": [2, 3], "reduction": "grid"}},
            {"world_size": 8},
            "A grid of 3 rows of 2 does not cover 8 ranks: "
            "set gradients.grid to two numbers whose product is 8, or leave it out.",
        ),
        (
            {"gradients": {"grid": [2, 4]}},
            {"world_size": 8},
            "gradients.grid is for gradients.reduction=grid, but that is auto: "
            "set it to grid, or leave gradients.grid out.",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    sections: dict[str, Any], counts: dict[str, int], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(sections, **counts)
    assert str(caught.value) == sentence


def test_a_run_without_evaluations_needs_no_validation_samples() -> None:
    assert plan_of({"train": {"eval_every_epochs": None}}, val_samples=0).val_samples == 0


def test_all_refusals_are_listed() -> None:
    with pytest.raises(UserError) as caught:
        plan_of({"data": {"num_classes": 9}}, train_samples=3, val_samples=0)
    assert len(str(caught.value).splitlines()) == 3


def test_workers_may_be_named_when_they_are_the_ranks() -> None:
    assert plan_of({"parallel": {"virtual_workers": 4}}, world_size=4).workers == 4
