from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpctrain.errors import MachineError
from hpctrain.gradients import replicas
from hpctrain.gradients.replicas import average_buffers, broadcast_state, check_replicas, fingerprint
from tests.unit.fake_group import FakeCommunicator, run_group


class Mixed(nn.Module):
    """Parameters and buffers of many dtypes and sizes, filled from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.narrow = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.rand(3, generator=generator) < 0.5)
        self.register_buffer("table", torch.randint(0, 2**60, (2, 3), generator=generator))
        self.register_buffer("wide", torch.randn(3, generator=generator, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0))
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean, self.norm.running_var):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            self.norm.num_batches_tracked.fill_(seed)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("limit_bytes", [1, 100, 1 << 20])
def test_everyone_starts_from_rank_zero(limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_BROADCAST_BYTES", limit_bytes)

    def work(comm: FakeCommunicator) -> dict[str, Tensor]:
        model = Mixed(comm.rank)
        if comm.rank == 1:
            model = model.to(memory_format=torch.channels_last)
        broadcast_state(comm, model)
        return state(model)

    expected = state(Mixed(0))
    for found in run_group(3, work):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_running_statistics_are_averaged_and_counters_left(world_size: int) -> None:
    def work(comm: FakeCommunicator) -> dict[str, Tensor]:
        model = Mixed(comm.rank)
        average_buffers(comm, model)
        return state(model)

    ranks = run_group(world_size, work)
    models = [Mixed(rank) for rank in range(world_size)]
    for name in ("norm.running_mean", "norm.running_var", "wide"):
        mean = torch.stack([state(model)[name].double() for model in models]).mean(0)
        for found in ranks:
            torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-7)
            assert torch.equal(found[name], ranks[0][name])
    for rank, found in enumerate(ranks):
        assert int(found["norm.num_batches_tracked"]) == rank
        assert torch.equal(found["table"], models[rank].table)


def test_equal_replicas_pass() -> None:
    run_group(3, lambda comm: check_replicas(comm, Mixed(1).named_parameters()))


@pytest.mark.parametrize(
    ("astray", "usual", "text"),
    [
        ([2], [0, 1, 3], r"rank 2 \(host2\) and ranks 0 \(host0\), 1 \(host1\), 3 \(host3\) hold"),
        ([0], [1, 2, 3], r"rank 0 \(host0\) and ranks 1 \(host1\), 2 \(host2\), 3 \(host3\) hold"),
        ([1, 3], [0, 2], r"ranks 1 \(host1\), 3 \(host3\) and ranks 0 \(host0\), 2 \(host2\) hold"),
        ([9], range(9), r"rank 9 \(host9\) and ranks 0 \(host0\), .*, 7 \(host7\) and 1 more hold"),
    ],
)
def test_ranks_outside_the_majority_are_named(astray: Sequence[int], usual: Sequence[int], text: str) -> None:
    def work(comm: FakeCommunicator) -> None:
        model = Mixed(1)
        if comm.rank in astray:
            with torch.no_grad():
                model.conv.bias.view(torch.int32)[2] ^= 1
        with pytest.raises(
            MachineError, match=rf"^the replicas have diverged: {text} different values, first in 'conv\.bias'$"
        ):
            check_replicas(comm, model.named_parameters())

    run_group(len(astray) + len(usual), work)


@given(
    length=st.integers(2, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    data=st.data(),
)
@settings(deadline=None)
def test_a_flipped_bit_and_a_swap_change_the_hash(length: int, dtype: torch.dtype, data: st.DataObject) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    before = int(fingerprint(tensor))
    flipped = tensor.clone()
    bit = data.draw(st.integers(0, 8 * dtype.itemsize - 2))
    flipped.view(integers)[data.draw(st.integers(0, length - 1))] ^= 1 << bit
    assert int(fingerprint(flipped)) != before
    one, other = data.draw(st.tuples(st.integers(0, length - 1), st.integers(0, length - 1)))
    swapped = tensor.clone()
    swapped[one], swapped[other] = tensor[other], tensor[one]
    assert (int(fingerprint(swapped)) == before) == torch.equal(swapped, tensor)


def test_a_hash_sees_across_its_blocks_and_does_not_copy_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_HASH_BLOCK", 16)
    tensor = torch.arange(64.0)
    assert int(fingerprint(tensor)) == int(fingerprint(tensor.clone()))
    assert int(fingerprint(tensor)) != int(fingerprint(torch.cat([tensor[16:32], tensor[:16], tensor[32:]])))
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert replicas._memory_order(weight).data_ptr() == weight.data_ptr()
