from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.arena import ALIGNMENT_BYTES, Arena, Bucket, dense_strides, plan_buckets
from hpctrain.errors import MachineError

SIZES = st.lists(st.integers(64, 5000), max_size=40)


@given(sizes=SIZES, bucket_bytes=st.integers(64, 8000), last_bytes=st.integers(0, 2000))
@settings(deadline=None)
def test_a_plan_holds_every_gradient_once_in_order_and_keeps_its_limits(
    sizes: list[int], bucket_bytes: int, last_bytes: int
) -> None:
    plan = plan_buckets(sizes, bucket_bytes, last_bytes)
    assert [position for span in plan for position in span] == list(range(len(sizes)))
    assert all(plan)
    for span in plan:
        assert len(span) == 1 or sum(sizes[position] for position in span) <= bucket_bytes
    if sizes and sizes[-1] <= min(last_bytes, bucket_bytes):
        assert sum(sizes[position] for position in plan[-1]) <= last_bytes


@given(sizes=SIZES, bucket_bytes=st.integers(64, 8000))
@settings(deadline=None)
def test_a_plan_has_few_buckets(sizes: list[int], bucket_bytes: int) -> None:
    plan = plan_buckets(sizes, bucket_bytes, last_bytes=0)
    loads = [sum(sizes[position] for position in span) for span in plan]
    assert all(load + sizes[following.start] > bucket_bytes for load, following in zip(loads, plan[1:], strict=False))


def small_model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.LazyLinear(9))
    model(torch.zeros(1, 3, 8, 8))
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 1 << 20])
def test_views_are_disjoint_aligned_and_strided_like_their_parameters(parts: int, bucket_bytes: int) -> None:
    model = small_model()
    arena = Arena(model.named_parameters(), bucket_bytes=bucket_bytes, parts=parts)
    slots = [slot for bucket in arena.buckets for slot in bucket.slots]
    assert [slot.name for slot in slots] == [name for name, _ in model.named_parameters()][::-1]
    for number, slot in enumerate(slots, start=1):
        assert slot.view.shape == slot.parameter.shape
        assert slot.view.stride() == slot.parameter.stride()
        assert slot.view.data_ptr() % ALIGNMENT_BYTES == 0
        slot.view.fill_(number)
    for bucket in arena.buckets:
        assert bucket.buffer.nbytes % (parts * ALIGNMENT_BYTES) == 0
        assert int((bucket.buffer != 0).sum()) == sum(slot.parameter.numel() for slot in bucket.slots)
    for number, slot in enumerate(slots, start=1):
        assert bool((slot.view == number).all())


def test_a_bucket_has_one_dtype_and_buckets_come_in_the_order_they_are_full() -> None:
    parameters = [
        (f"p{i}", nn.Parameter(torch.zeros(40, dtype=dtype)))
        for i, dtype in enumerate([torch.float32, torch.float64, torch.float32, torch.float64, torch.float32])
    ]
    arena = Arena(parameters, bucket_bytes=400, last_bytes=0)
    assert [[slot.name for slot in bucket.slots] for bucket in arena.buckets] == [["p3"], ["p4", "p2"], ["p1"], ["p0"]]
    assert all(bucket.buffer.dtype == slot.parameter.dtype for bucket in arena.buckets for slot in bucket.slots)


def test_the_bucket_that_is_ready_last_is_small() -> None:
    parameters = [(f"p{i}", nn.Parameter(torch.zeros(100_000))) for i in range(20)]
    last: Bucket = Arena(parameters, bucket_bytes=4 << 20).buckets[-1]
    assert [slot.name for slot in last.slots] == ["p1", "p0"]


def test_gaps_in_a_parameter_are_not_copied_into_the_bucket() -> None:
    assert dense_strides(torch.zeros(4, 6)[:, ::2]) == (3, 1)
    assert dense_strides(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)) == (60, 1, 15, 3)
    assert dense_strides(torch.zeros(3, 4).t()) == (1, 4)


def test_gradients_are_views_and_stay_so_when_zeroed() -> None:
    model = small_model()
    arena = Arena(model.named_parameters(), bucket_bytes=1 << 20)
    arena.attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    arena.buckets[0].buffer.fill_(2.0)
    assert all(bool((parameter.grad == 2).all()) for parameter in model.parameters() if parameter.grad is not None)
    optimizer.zero_grad(set_to_none=False)
    arena.detach()
    assert all(parameter.grad is None for parameter in model.parameters())
    for slot in arena.buckets[0].slots:
        assert not slot.view.any()


def test_a_gradient_set_by_others_is_refused_by_name() -> None:
    model = small_model()
    arena = Arena(model.named_parameters(), bucket_bytes=1 << 20)
    arena.attach()
    model[2].weight.grad = torch.ones_like(model[2].weight)
    with pytest.raises(MachineError, match=r"the \.grad of parameter '2\.weight' was set outside"):
        arena.detach()
