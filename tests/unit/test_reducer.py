from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.comm.serial import SerialCommunicator
from hpctrain.errors import MachineError, UserError
from hpctrain.gradients.reducer import GradientExchange
from hpctrain.gradients.tally import ExchangeStats
from hpctrain.topology.ranks import Topology
from tests.unit.fake_group import FakeCommunicator, run_group

REDUCTIONS = ["engine", "ordered"]
SMALL_BUCKET_BYTES = 600
FEATURES, CLASSES, BATCH = 6, 5, 4


class Net(nn.Module):
    """Several small layers; a skipped one, a shared weight, an empty and an integer tensor on request."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(FEATURES, 16)
        self.optional = nn.Linear(16, 16)
        self.shared = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)
        self.empty = nn.Parameter(torch.zeros(0))
        self.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        self.use_optional = True
        with torch.no_grad():
            for parameter in (p for p in self.parameters() if p.is_floating_point()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.use_optional:
            x = torch.tanh(self.optional(x))
        x = torch.tanh(self.shared(x))
        return self.head(torch.tanh(functional.linear(x, self.shared.weight)))


def batch(worker: int, micro_batch: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * worker + micro_batch)
    return torch.randn(BATCH, FEATURES, generator=generator), torch.arange(BATCH) % CLASSES


def backward(model: nn.Module, worker: int, micro_batch: int = 0) -> None:
    x, y = batch(worker, micro_batch)
    functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(
    workers: int, micro_batches: int = 1, skips: Callable[[int], bool] = lambda worker: False
) -> dict[str, Tensor]:
    """Mean over workers of the sum over micro-batches, in float64."""
    total: dict[str, Tensor] = {}
    for worker in range(workers):
        model = Net().double()
        model.use_optional = not skips(worker)
        for micro_batch in range(micro_batches):
            backward(model, worker, micro_batch)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.numel():
                found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                total[name] = total.get(name, 0) + found / workers
    return total


def one_step(
    comm: FakeCommunicator | SerialCommunicator, exchange: GradientExchange, model: nn.Module
) -> ExchangeStats:
    with exchange.accumulate(last=True):
        backward(model, comm.rank)
    return exchange.finish()


def exchange_of(comm: Any, model: nn.Module, **options: Any) -> GradientExchange:
    return GradientExchange(model, comm, **{"bucket_bytes": SMALL_BUCKET_BYTES, **options})


def serial() -> SerialCommunicator:
    return SerialCommunicator(Topology(), torch.device("cpu"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_means_equal_float64_on_every_rank_step_after_step(world_size: int, reduction: str) -> None:
    def work(comm: FakeCommunicator) -> list[dict[str, Tensor]]:
        model = Net()
        exchange = exchange_of(comm, model, reduction=reduction)
        steps = []
        for _ in range(3):
            one_step(comm, exchange, model)
            steps.append(gradients(model))
        return steps

    ranks = run_group(world_size, work)
    for steps in ranks:
        for found in steps:
            assert_close(found, reference(world_size))
            assert all(torch.equal(found[name], ranks[0][0][name]) for name in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accumulation_is_one_exchange_of_the_scaled_sum(reduction: str) -> None:
    def work(comm: FakeCommunicator) -> tuple[dict[str, Tensor], int]:
        model = Net()
        exchange = exchange_of(comm, model, reduction=reduction)
        before = len(comm.group.log[comm.rank])
        for micro_batch in range(3):
            with exchange.accumulate(last=micro_batch == 2, scale=1 / 3):
                backward(model, comm.rank, micro_batch)
        stats = exchange.finish()
        calls = len(comm.group.log[comm.rank]) - before
        assert calls == stats.buckets * (4 if reduction == "ordered" else 1)
        assert stats.early > 0
        return gradients(model), calls

    expected = {name: value / 3 for name, value in reference(2, micro_batches=3).items()}
    for found, _ in run_group(2, work):
        assert_close(found, expected)


def test_accumulation_on_one_rank_copies_nothing_and_gives_the_same() -> None:
    model = Net()
    exchange = exchange_of(serial(), model)
    for micro_batch in range(4):
        with exchange.accumulate(last=micro_batch == 3, scale=1 / 4):
            backward(model, 0, micro_batch)
    fresh = model.head.weight.grad
    stats = exchange.finish()
    assert model.head.weight.grad is fresh
    assert (stats.buckets, stats.buffer_bytes) == (0, 0)
    assert_close(gradients(model), {name: value / 4 for name, value in reference(1, micro_batches=4).items()})
    assert sum(tensor.numel() for tensor in exchange.gradients) == sum(g.numel() for g in gradients(model).values())


def test_one_rank_without_a_gradient_has_zeros_as_several_have() -> None:
    model = Net()
    exchange = exchange_of(serial(), model)
    model.use_optional = False
    assert one_step(serial(), exchange, model).missing == 2
    assert_close(gradients(model), reference(1, skips=lambda worker: True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ranks_without_a_gradient_send_zeros_and_stay_in_step(reduction: str) -> None:
    def work(comm: FakeCommunicator) -> list[tuple[dict[str, Tensor], int]]:
        model = Net()
        exchange = exchange_of(comm, model, reduction=reduction)
        steps = []
        for skipping in (0, 1, 2):
            model.use_optional = comm.rank >= skipping
            stats = one_step(comm, exchange, model)
            steps.append((gradients(model), stats.missing))
        return steps

    for rank, steps in enumerate(run_group(2, work)):
        for skipping, (found, missing) in enumerate(steps):
            assert_close(found, reference(2, skips=lambda worker, skipping=skipping: worker < skipping))
            assert missing == (2 if rank < skipping else 0)


def test_a_gradient_of_an_early_pass_alone_is_not_lost() -> None:
    def work(comm: FakeCommunicator) -> dict[str, Tensor]:
        model = Net()
        exchange = exchange_of(comm, model)
        for micro_batch in range(2):
            model.use_optional = micro_batch == 0
            with exchange.accumulate(last=micro_batch == 1):
                backward(model, comm.rank, micro_batch)
        assert exchange.finish().missing == 0
        return gradients(model)

    models = [Net().double() for _ in range(2)]
    for worker, model in enumerate(models):
        for micro_batch in range(2):
            model.use_optional = micro_batch == 0
            backward(model, worker, micro_batch)
    first, second = (gradients(model) for model in models)
    for found in run_group(2, work):
        assert_close(found, {name: (first[name] + second[name]) / 2 for name in first})


class Branches(nn.Module):
    """Independent parameters whose gradients arrive in an order of the caller's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = nn.ParameterList(torch.ones(20) for _ in range(5))

    def visit(self, order: list[int]) -> None:
        for leaf in order:
            (self.leaves[leaf].sum() * (leaf + 1)).backward()


def test_buckets_are_launched_in_one_order_whatever_order_they_fill_in() -> None:
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]]

    def work(comm: FakeCommunicator) -> tuple[int, list[float]]:
        model = Branches()
        # All buckets have one size, so that a wrong order is no error in the group but would mix up the sums.
        exchange = GradientExchange(model, comm, bucket_bytes=128)
        with exchange.accumulate(last=True):
            model.visit(orders[comm.rank])
        stats = exchange.finish()
        return stats.early, [float(leaf.grad[0]) for leaf in model.leaves if leaf.grad is not None]

    results = run_group(3, work)
    assert [means for _, means in results] == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 3
    assert all(early == 5 for early, _ in results)


def test_full_buckets_start_during_the_backward_pass() -> None:
    launched: list[int] = []

    def work(comm: FakeCommunicator) -> ExchangeStats:
        model = Net()
        exchange = exchange_of(comm, model)
        agreed = len(comm.group.log[comm.rank])
        model.first.weight.register_hook(lambda _: launched.append(len(comm.group.log[comm.rank]) - agreed))
        return one_step(comm, exchange, model)

    stats = run_group(2, work)
    assert all(entry.early == entry.buckets > 1 for entry in stats)
    assert min(launched) >= 1


def test_freezing_and_releasing_parameters_between_steps() -> None:
    def work(comm: FakeCommunicator) -> list[tuple[set[str], int]]:
        model = Net()
        exchange = exchange_of(comm, model)
        seen = []
        for frozen in (False, True, False):
            model.first.requires_grad_(not frozen)
            stats = one_step(comm, exchange, model)
            seen.append((set(gradients(model)), stats.early == stats.buckets))
        return seen

    everything = set(reference(1))
    for seen in run_group(2, work):
        assert seen == [
            (everything, True),
            (everything - {"first.weight", "first.bias"}, True),
            (everything, True),
        ]


def test_a_weight_of_two_layers_is_exchanged_once() -> None:
    tied = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.Tanh())
    tied[2].weight = tied[0].weight

    def work(comm: FakeCommunicator) -> tuple[Tensor, int]:
        model = copy.deepcopy(tied)
        exchange = GradientExchange(model, comm)
        stats = one_step(comm, exchange, model)
        return model[2].weight.grad.clone(), stats.buffer_bytes

    models = [copy.deepcopy(tied).double() for _ in range(2)]
    for worker, model in enumerate(models):
        backward(model, worker)
    expected = (models[0][0].weight.grad + models[1][0].weight.grad) / 2
    for found, buffer_bytes in run_group(2, work):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-7)
        # 36 weights and two biases of 6, each padded to 16
        assert buffer_bytes == 4 * (48 + 16 + 16 + 16)


def test_gradients_of_channels_last_weights_keep_their_layout() -> None:
    def work(comm: FakeCommunicator) -> bool:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
        exchange = exchange_of(comm, model)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(comm.rank))
        with exchange.accumulate(last=True):
            model(x.to(memory_format=torch.channels_last)).square().mean().backward()
        exchange.finish()
        return all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())

    assert run_group(2, work) == [True, True]


def different(kind: str) -> nn.Module:
    model = Net()
    if kind == "shape":
        model.head = nn.Linear(16, CLASSES + 1)
    elif kind == "dtype":
        model.head = model.head.double()
    elif kind == "frozen":
        model.first.requires_grad_(False)
    elif kind == "order":
        model.optional, model.shared = model.shared, model.optional
        model._modules["optional"] = model._modules.pop("optional")
    return model


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("shape", r"'head\.\w+' \[6"),
        ("dtype", r"'head\.\w+' .*float64"),
        ("frozen", "bucket|nothing"),
        ("order", "optional"),
    ],
)
def test_ranks_with_different_models_are_told_which_parameter(kind: str, named: str) -> None:
    def work(comm: FakeCommunicator) -> None:
        with pytest.raises(UserError, match=rf"rank 2 exchanges .*{named}.* where rank 0 .* build the same model"):
            GradientExchange(different(kind) if comm.rank == 2 else Net(), comm)

    run_group(3, work)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduction": "tree"}, r"gradients\.reduction='tree' is not known; choose one of: engine, ordered"),
        ({"compression": "int8"}, r"gradients\.compression='int8' is not known; choose one of: none"),
    ],
)
def test_unknown_names_list_what_is_known(options: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        GradientExchange(Net(), serial(), **options)


def test_backward_outside_of_a_pass_or_twice_inside_is_refused() -> None:
    def work(comm: FakeCommunicator) -> None:
        model = Net()
        exchange = exchange_of(comm, model)
        with pytest.raises(MachineError, match=r"run backward\(\) once inside each exchange\.accumulate"):
            backward(model, comm.rank)
        model.zero_grad()
        with exchange.accumulate(last=False):
            backward(model, comm.rank)
            with pytest.raises(MachineError, match=r"run backward\(\) once"):
                backward(model, comm.rank)

    run_group(2, work)


def test_a_replaced_gradient_is_refused() -> None:
    def work(comm: FakeCommunicator) -> None:
        model = Net()
        exchange = exchange_of(comm, model)
        one_step(comm, exchange, model)
        model.head.bias.grad = torch.ones(CLASSES)
        with pytest.raises(MachineError, match=r"'head\.bias' was set outside"), exchange.accumulate(last=True):
            backward(model, comm.rank)

    run_group(2, work)


def test_optimizers_may_clear_gradients_either_way() -> None:
    def work(comm: FakeCommunicator) -> list[dict[str, Tensor]]:
        model = Net()
        exchange = exchange_of(comm, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = []
        for to_none in (True, False):
            one_step(comm, exchange, model)
            seen.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        return seen

    for seen in run_group(2, work):
        for found in seen:
            assert_close(found, reference(2))


def test_after_close_the_model_is_free_again() -> None:
    def work(comm: FakeCommunicator) -> None:
        model = Net()
        exchange = exchange_of(comm, model)
        one_step(comm, exchange, model)
        exchange.close()
        model.zero_grad()
        backward(model, comm.rank)

    run_group(2, work)


def test_a_step_allocates_no_buffers() -> None:
    def work(comm: FakeCommunicator) -> list[list[int]]:
        model = Net()
        exchange = exchange_of(comm, model, reduction="ordered")
        places = []
        for _ in range(2):
            one_step(comm, exchange, model)
            places.append([tensor.data_ptr() for tensor in exchange.gradients])
            assert all(p.grad is None or p.grad.untyped_storage().data_ptr() in places[-1] for p in model.parameters())
        return places

    for places in run_group(2, work):
        assert places[0] == places[1]
