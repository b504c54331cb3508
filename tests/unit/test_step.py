"""One optimizer step: accumulation, the rate of its step, moving average, and gradients that are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hpctrain.data.types import Batch, Request
from hpctrain.train.parts import Parts
from hpctrain.train.step import seed_micro_batch, train_step
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.small_runs import parts_of, recipe


def pictures(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=generator), torch.randint(0, 7, (count,), generator=generator)


def batch(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, Request(np.arange(len(labels)), 0, len(labels), "train"), np.arange(len(labels)))


def slices(images: Tensor, labels: Tensor, size: int) -> Iterator[Batch]:
    return map(batch, images.split(size), labels.split(size))


def flat(parts: Parts) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in parts.model.parameters()])


@pytest.mark.parametrize("accumulation", [2, 3, 6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_micro_batches_make_the_step_of_one_batch(accumulation: int, smoothing: float) -> None:
    images, labels = pictures(12)
    moved = []
    for k in (1, accumulation):
        train = {"accumulation": k, "batch_per_worker": 12 // k, "label_smoothing": smoothing}
        parts = parts_of(recipe(train=train))
        stream = slices(images.repeat(3, 1, 1, 1), labels.repeat(3), 12 // k)
        losses = [train_step(parts, stream, step) for step in range(3)]
        moved.append((flat(parts), torch.stack(losses)))
    torch.testing.assert_close(moved[1][0], moved[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved[1][1], moved[0][1], rtol=0, atol=1e-6)


def test_two_workers_make_the_step_of_one_with_the_whole_batch() -> None:
    images, labels = pictures(16)
    whole = parts_of(recipe(train={"batch_per_worker": 16}))
    start = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    loss = train_step(whole, iter([batch(images, labels)]), 0)

    def rank(comm: FakeCommunicator) -> tuple[Tensor, Tensor]:
        parts = parts_of(recipe(train={"batch_per_worker": 4, "accumulation": 2}), comm)
        parts.model.load_state_dict(start)
        mine = itertools.islice(slices(images, labels, 4), comm.rank, None, 2)
        return train_step(parts, mine, 0), flat(parts)

    (loss0, moved0), (loss1, moved1) = run_group(2, rank)
    assert torch.equal(moved0, moved1)
    torch.testing.assert_close(moved0, flat(whole), rtol=0, atol=1e-6)
    torch.testing.assert_close((loss0 + loss1) / 2, loss, rtol=0, atol=1e-6)


def test_the_rate_is_that_of_the_step() -> None:
    schedule = {"kind": "cosine", "lr": 0.4, "warmup_epochs": 1}
    parts = parts_of(recipe(schedule=schedule, optimizer={"weight_decay": 0.1}))
    stream = itertools.repeat(batch(*pictures(8)))
    for step in (0, 5, 30):
        train_step(parts, stream, step)
        rates = {group["lr"] for group in parts.optimizer.param_groups}
        assert rates == {parts.plan.schedule.lr_at(step)}


def test_the_moving_average_follows_each_step() -> None:
    parts = parts_of(recipe(train={"ema_decay": 0.5}))
    assert parts.ema is not None
    expected = flat(parts)
    for step in range(3):
        train_step(parts, itertools.repeat(batch(*pictures(8))), step)
        expected = 0.5 * expected + 0.5 * flat(parts)
    shadow = torch.cat([tensor.reshape(-1) for tensor in parts.ema.state_dict().values()])
    torch.testing.assert_close(shadow, expected)


def test_gradients_of_fp16_that_overflow_on_one_rank_move_no_rank() -> None:
    """The loss scale halves everywhere; the moving average and momentum stay as well."""
    images, labels = pictures(8)

    def rank(comm: FakeCommunicator) -> tuple[bool, float, bool]:
        parts = parts_of(recipe(train={"batch_per_worker": 4, "precision": "fp16", "ema_decay": 0.5}), comm)
        assert parts.loss_scale is not None
        before, scale = flat(parts), parts.loss_scale.value
        mine = images[comm.rank * 4 :][:4] * (float("inf") if comm.rank else 1.0)
        train_step(parts, iter([batch(mine, labels[:4])]), 0)
        unmoved = torch.equal(flat(parts), before) and not parts.optimizer.state
        halved = parts.loss_scale.value
        train_step(parts, iter([batch(images[:4], labels[:4])]), 1)
        return unmoved, halved / scale, torch.equal(flat(parts), before)

    assert run_group(2, rank) == [(True, 0.5, False)] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_computes_in_its_type_and_keeps_parameters_wide(precision: str) -> None:
    parts = parts_of(recipe(train={"precision": precision}))
    seen = set()
    parts.model.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss = train_step(parts, iter([batch(*pictures(8))]), 0)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {parameter.dtype for parameter in parts.model.parameters()} == {torch.float32}
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_channels_last_reaches_model_and_pictures() -> None:
    parts = parts_of(recipe(model={"name": "resnet20"}, train={"channels_last": True}, data={"channels": 3}))
    images = torch.randn(2, 3, 8, 8)
    laid, _ = parts.to_device(batch(images, torch.zeros(2, dtype=torch.int64)))
    assert laid.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid, images)
    wide = [p for p in parts.model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def test_dropout_is_a_function_of_seed_step_and_worker() -> None:
    def drawn(*place: int) -> float:
        seed_micro_batch(*place)
        return float(torch.rand(()))

    places = list(itertools.product((0, 1, 2, 2**32 - 1), (0, 1, 2, 1000), (0, 1, 2, 63)))
    once = [drawn(*place) for place in places]
    assert len(set(once)) == len(places)
    assert [drawn(*place) for place in places] == once
