"""Gradients in two bytes: the mean is right at any magnitude, and what goes wrong is noticed by all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpctrain.errors import UserError
from hpctrain.gradients.reducer import GradientExchange
from hpctrain.gradients.tally import ExchangeStats
from tests.unit.fake_group import FakeCommunicator, run_group

NARROW = ["fp16", "bf16", "fp16_ef"]
#: rank hosts -> how the sum is taken
PLACES = {"engine": None, "ordered": None, "auto": "one host"}


class Given(nn.Module):
    """Parameters whose gradients are what ``deliver`` is given."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def deliver(self, gradients: Sequence[Tensor | None]) -> None:
        used = [(w, g) for w, g in zip(self.weights, gradients, strict=True) if g is not None]
        torch.autograd.backward([w for w, _ in used], [g.clone() for _, g in used])


SHAPES = [(7,), (40, 3), (33,), (5, 5, 3), (1,)]


def drawn(rank: int, step: int, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def exchange_of(comm: FakeCommunicator, model: nn.Module, **options: Any) -> GradientExchange:
    return GradientExchange(model, comm, **{"bucket_bytes": 600, "compression": "fp16", **options})


def step_of(
    exchange: GradientExchange, model: Given, gradients: Sequence[Tensor | None], **options: Any
) -> ExchangeStats:
    with exchange.accumulate(last=True, **options):
        model.deliver(gradients)
    return exchange.finish()


def hosts_for(reduction: str, world_size: int) -> list[str] | None:
    return ["here"] * world_size if PLACES[reduction] else None


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [300.0, 1.0, 1e-8])
@pytest.mark.parametrize("reduction", PLACES)
@pytest.mark.parametrize("compression", NARROW)
def test_the_mean_is_right_at_any_magnitude(compression: str, reduction: str, scale: float) -> None:
    if compression == "bf16" and reduction == "engine":
        reduction = "ordered"  # sums three numbers in bfloat16 otherwise, to two digits

    def work(comm: FakeCommunicator) -> list[list[Tensor]]:
        model = Given(SHAPES)
        exchange = exchange_of(comm, model, compression=compression, reduction=reduction)
        means = []
        for step in range(3):
            stats = step_of(exchange, model, drawn(comm.rank, step, scale))
            assert stats.verdict is not None and stats.verdict.finite
            means.append([w.grad.clone() for w in model.weights if w.grad is not None])
        exchange.close()
        return means

    ranks = run_group(3, work, hosts_for(reduction, 3))
    for step, means in enumerate(ranks[0]):
        for position, found in enumerate(means):
            expected = torch.stack([drawn(rank, step, scale)[position].double() for rank in range(3)]).mean(0)
            assert relative_error(found, expected) < 0.01
            assert all(torch.equal(found, other[step][position]) for other in ranks)


def test_the_ordered_sum_has_the_same_bits_through_memory_and_through_the_engine() -> None:
    def work(comm: FakeCommunicator) -> list[Tensor]:
        model = Given(SHAPES)
        exchange = exchange_of(comm, model, reduction="ordered")
        for step in range(2):
            step_of(exchange, model, drawn(comm.rank, step, 1e-3))
        return [w.grad.clone() for w in model.weights if w.grad is not None]

    apart, together = run_group(4, work), run_group(4, work, ["here"] * 4)
    assert all(torch.equal(one, other) for one, other in zip(apart[0], together[0], strict=True))


def test_engines_are_handed_half_the_bytes() -> None:
    def work(comm: FakeCommunicator) -> tuple[set[torch.dtype], int, int]:
        model, other = Given(SHAPES), Given(SHAPES)
        wide = exchange_of(comm, other, compression="none", reduction="engine")
        wide_bytes = step_of(wide, other, drawn(0, 0, 1.0)).buffer_bytes
        narrow = exchange_of(comm, model, reduction="engine")
        stats = step_of(narrow, model, drawn(0, 0, 1.0))
        return {buffer.dtype for buffer in narrow.buffers}, stats.buffer_bytes, wide_bytes

    dtypes, narrow_bytes, wide_bytes = run_group(2, work)[0]
    assert dtypes == {torch.float16}
    assert 2 * narrow_bytes == wide_bytes


@pytest.mark.parametrize("reduction", PLACES)
def test_one_bad_rank_is_the_verdict_of_all_and_the_next_step_is_good(reduction: str) -> None:
    def work(comm: FakeCommunicator) -> list[bool]:
        model = Given(SHAPES)
        exchange = exchange_of(comm, model, reduction=reduction)
        finite = []
        for step in range(4):
            gradients = drawn(comm.rank, step, 1.0)
            if step == 2 and comm.rank == 1:
                gradients[1][4, 1] = float("inf")
            stats = step_of(exchange, model, gradients)
            assert stats.verdict is not None
            finite.append(stats.verdict.finite)
        assert exchange.tally.skipped == 1
        return finite

    assert run_group(2, work, hosts_for(reduction, 2)) == [[True, True, False, True]] * 2


def test_a_sum_that_grows_beyond_its_headroom_costs_one_step() -> None:
    def work(comm: FakeCommunicator) -> list[tuple[bool, int]]:
        model, seen = Given(SHAPES), []
        exchange = exchange_of(comm, model, reduction="engine")
        for step, scale in enumerate((1e-3, 1e-3, 1e3, 1e3, 1e3)):
            stats = step_of(exchange, model, drawn(comm.rank, step, scale))
            assert stats.verdict is not None
            seen.append((stats.verdict.finite, stats.early))
        return seen

    seen = run_group(2, work)[0]
    assert [finite for finite, _ in seen] == [True, True, False, True, True]
    assert seen[0][1] == seen[3][1] == 0, "a magnitude that is not known is measured before anything is sent"
    assert seen[1][1] == seen[4][1] > 0


def test_what_rounding_did_is_counted_where_it_is_asked_for() -> None:
    def work(comm: FakeCommunicator) -> list[int]:
        model = Given([(4,), (3,)])
        exchange = GradientExchange(model, comm, compression="fp16", reduction="engine")
        large = torch.full((3,), 1.0)
        step_of(exchange, model, [torch.ones(4), large])
        # The sum of the step before was 2, so that 2**11 of ours is the largest power that fits.
        tiny = torch.tensor([0.0, 1e-12, 2.0**-11 * 2.0**-16, 1.0])
        step_of(exchange, model, [tiny, torch.tensor([1e9, 1.0, float("inf")])], count=True)
        return exchange.tally.rounding.tolist()

    assert run_group(2, work)[0] == [1, 1, 1, 1]


def test_error_feedback_lets_small_gradients_through_in_the_end() -> None:
    """A gradient far below the wire's resolution beside a large one: rounded it is lost, fed back it is not."""

    def work(comm: FakeCommunicator, compression: str) -> float:
        model = Given([(2,)])
        exchange = GradientExchange(model, comm, compression=compression, reduction="engine")
        total = 0.0
        for _ in range(200):
            step_of(exchange, model, [torch.tensor([1000.0, 1.0 + 2.0**-13])])
            assert model.weights[0].grad is not None
            total += float(model.weights[0].grad[1]) - 1.0
        return total / 200 / 2.0**-13

    assert run_group(2, lambda comm: work(comm, "fp16"))[0] == pytest.approx(0.0)
    assert run_group(2, lambda comm: work(comm, "fp16_ef"))[0] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("compression", ["none", *NARROW])
def test_micro_batches_the_loss_scale_and_missing_gradients_compose(compression: str) -> None:
    def work(comm: FakeCommunicator) -> list[Tensor]:
        model = Given(SHAPES)
        exchange = exchange_of(comm, model, compression=compression, reduction="ordered")
        for _ in range(2):
            for micro in range(2):
                gradients: list[Tensor | None] = [g * 1024 for g in drawn(comm.rank, micro, 1.0)]
                if comm.rank == 0:
                    gradients[2] = None
                with exchange.accumulate(last=micro == 1, scale=1 / 2048):
                    model.deliver(gradients)
            stats = exchange.finish()
        assert stats.missing == (1 if comm.rank == 0 else 0)
        return [w.grad.clone() for w in model.weights if w.grad is not None]

    means = run_group(2, work)[0]
    for position, found in enumerate(means):
        ranks = [1] if position == 2 else [0, 1]
        parts = [drawn(rank, micro, 1.0)[position].double() for rank in ranks for micro in (0, 1)]
        assert relative_error(found, torch.stack(parts).sum(0) / 4) < 0.01


def test_scales_go_on_from_a_checkpoint() -> None:
    def work(comm: FakeCommunicator) -> list[bool]:
        model, other = Given(SHAPES), Given(SHAPES)
        first, second = (exchange_of(comm, net, reduction="engine") for net in (model, other))
        step_of(first, model, drawn(comm.rank, 0, 1.0))
        second.load_state_dict(first.state_dict())
        for step in (1, 2):
            ours = step_of(first, model, drawn(comm.rank, step, 1.0))
            theirs = step_of(second, other, drawn(comm.rank, step, 1.0))
            assert ours.early == theirs.early > 0
        pairs = zip(model.weights, other.weights, strict=True)
        return [torch.equal(one.grad, two.grad) for one, two in pairs if one.grad is not None and two.grad is not None]

    assert run_group(2, work)[0] == [True] * len(SHAPES)


@pytest.mark.parametrize("compression", ["none", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_shrinks_all_gradients_by_one_factor(world_size: int, compression: str) -> None:
    def work(comm: FakeCommunicator) -> tuple[float, float, list[Tensor]]:
        model = Given(SHAPES)
        exchange = exchange_of(comm, model, compression=compression, norm=True)
        verdict = step_of(exchange, model, drawn(0, 0, 1.0)).verdict
        assert verdict is not None and verdict.norm is not None
        before = [w.grad.clone() for w in model.weights if w.grad is not None]
        exchange.clip_(2 * verdict.norm, verdict.norm)
        assert all(torch.equal(w.grad, g) for w, g in zip(model.weights, before, strict=True) if w.grad is not None)
        exchange.clip_(0.5, verdict.norm)
        after = torch.cat([w.grad.flatten() for w in model.weights if w.grad is not None])
        return verdict.norm, float(after.norm()), before

    norm, clipped, before = run_group(world_size, work)[0]
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()))
    assert clipped == pytest.approx(0.5)


def test_names_that_are_not_known_are_refused_with_those_that_are() -> None:
    def work(comm: FakeCommunicator) -> None:
        exchange_of(comm, Given(SHAPES), compression="fp8")

    with pytest.raises(UserError, match=r"gradients\.compression='fp8' is not known; choose one of: none, fp16, bf16"):
        run_group(2, work)
