"""Training and evaluation deal out samples exactly, for any size, world and starting point."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.feed import Share, eval_requests, steps_left, train_requests
from hpctrain.data.sampler import EpochOrder
from hpctrain.data.types import Request

sizes = st.integers(1, 150)
worlds = st.integers(1, 8)
batches = st.integers(1, 7)
accumulations = st.integers(1, 3)


def order_of(num_samples: int) -> EpochOrder:
    return EpochOrder(num_samples, 1, 8, 4)


def counted(requests: Iterable[Request]) -> list[int]:
    return [int(sample) for request in requests for sample in request.sample_ids[: request.valid]]


@settings(deadline=None)
@given(sizes, worlds, batches, accumulations, st.booleans())
def test_an_epoch_over_all_workers(num_samples: int, world: int, batch: int, accumulation: int, pad: bool) -> None:
    shares = [Share(worker, world, batch, accumulation) for worker in range(world)]
    per_worker = [list(train_requests(order_of(num_samples), share, pad=pad, epochs=1)) for share in shares]
    steps = steps_left(num_samples, shares[0].batch_global, 0, pad)
    assert {len(requests) for requests in per_worker} == {steps * accumulation}
    assert all(len(request.sample_ids) == batch for requests in per_worker for request in requests)
    seen = [sample for requests in per_worker for sample in counted(requests)]
    assert len(seen) == len(set(seen)), "no sample counts twice"
    assert len(seen) == (num_samples if pad else steps * shares[0].batch_global)
    if pad:
        assert set(seen) == set(range(num_samples))


@settings(deadline=None)
@given(st.integers(24, 200), st.sampled_from([(1, 12, 1), (2, 6, 1), (2, 3, 2), (3, 4, 1), (4, 1, 3), (1, 4, 3)]))
def test_samples_of_a_step_depend_on_the_global_batch_alone(num_samples: int, split: tuple[int, int, int]) -> None:
    world, batch, accumulation = split
    order = order_of(num_samples)
    shares = [Share(worker, world, batch, accumulation) for worker in range(world)]
    streams = [list(train_requests(order, share, pad=False, epochs=1)) for share in shares]
    for step in range(num_samples // 12):
        micro = [streams[w][step * accumulation + a] for a in range(accumulation) for w in range(world)]
        joined = np.concatenate([request.sample_ids for request in micro])
        assert np.array_equal(joined, order.ids(0, step * 12, step * 12 + 12))


@settings(deadline=None)
@given(sizes, worlds, batches, st.booleans(), st.integers(0, 6))
def test_resuming_at_a_step_continues_the_stream(num: int, world: int, batch: int, pad: bool, step: int) -> None:
    share = Share(world - 1, world, batch)
    steps = steps_left(num, share.batch_global, 0, pad)
    step = min(step, steps)
    whole = list(train_requests(order_of(num), share, pad=pad, epochs=2))
    rest = train_requests(order_of(num), share, pad=pad, epochs=2, position=step * share.batch_global)
    for expected, request in zip(whole[step:], rest, strict=True):
        assert np.array_equal(expected.sample_ids, request.sample_ids)
        assert (expected.epoch, expected.valid, expected.mode) == (request.epoch, request.valid, request.mode)


@settings(deadline=None)
@given(sizes, worlds, worlds, batches, st.integers(0, 150))
def test_another_world_size_sees_exactly_the_rest(num: int, before: int, after: int, batch: int, step: int) -> None:
    order = order_of(num)
    step = min(step, steps_left(num, before * batch, 0, False))
    position = step * before * batch
    seen = {int(sample) for sample in order.ids(0, 0, position)}
    shares = [Share(worker, after, batch) for worker in range(after)]
    rest = [s for share in shares for s in counted(train_requests(order, share, pad=True, epochs=1, position=position))]
    assert sorted(rest) == sorted(set(range(num)) - seen)


def test_padding_repeats_the_start_of_the_same_epoch() -> None:
    order = order_of(10)
    requests = list(train_requests(order, Share(1, 2, 3), pad=True, epochs=1))
    assert [request.valid for request in requests] == [3, 1]
    assert np.array_equal(requests[1].sample_ids, np.concatenate([order.ids(0, 9, 10), order.ids(0, 0, 2)]))


def test_padding_a_set_smaller_than_the_batch_goes_round() -> None:
    (request,) = train_requests(order_of(3), Share(0, 1, 8), pad=True, epochs=1)
    assert request.valid == 3
    assert np.array_equal(request.sample_ids, np.resize(order_of(3).ids(0, 0, 3), 8))


@settings(deadline=None)
@given(st.integers(1, 500), worlds, st.integers(1, 64))
def test_evaluation_sees_each_sample_once(num_samples: int, world: int, batch: int) -> None:
    per_rank = [list(eval_requests(num_samples, rank, world, batch)) for rank in range(world)]
    assert len({len(requests) for requests in per_rank}) == 1
    everything = [request for requests in per_rank for request in requests]
    assert all(len(request.sample_ids) == batch and request.mode == "eval" for request in everything)
    assert sorted(counted(everything)) == list(range(num_samples))
    assert all((request.sample_ids[request.valid :] == 0).all() for request in everything)
