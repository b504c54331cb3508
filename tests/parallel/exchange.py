"""What one rank does for test_exchange: short trainings of a small net, of which it reports digests and distances."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.comm import registry
from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError
from hpctrain.gradients.loss_scale import LossScale
from hpctrain.gradients.reducer import GradientExchange
from hpctrain.gradients.replicas import average_buffers, broadcast_state, check_replicas
from hpctrain.topology.ranks import detect
from tests.parallel.launch import report

STEPS = 5
BATCH = 4
BUCKET_BYTES = 2048


def build(norm: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.Tanh()]
    layers += [nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 32), nn.Tanh(), nn.Linear(32, 5)]
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, worker: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    return torch.randn(BATCH, 3, 9, 9, generator=generator), labels


def loss_of(model: nn.Module, step: int, worker: int) -> Tensor:
    images, labels = batch(step, worker)
    return functional.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def distance(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((one.detach().double() - two.detach().double()).abs().max()) for one, two in pairs)


def train(comm: Communicator, reduction: str, *, norm: bool, accumulation: int = 1) -> tuple[nn.Module, list[int]]:
    """Ranks start from different weights, which the broadcast makes equal; worker w of a pass has its own batch."""
    model = build(norm, seed=comm.rank)
    broadcast_state(comm, model)
    exchange = GradientExchange(model, comm, reduction=reduction, bucket_bytes=BUCKET_BYTES)
    optimizer, early = sgd(model), []
    for step in range(STEPS):
        for micro in range(accumulation):
            with exchange.accumulate(last=micro == accumulation - 1, scale=1 / accumulation):
                loss_of(model, step, micro * comm.world_size + comm.rank).backward()
        # Ranks come to the exchange at different times.
        time.sleep(0.002 * ((step + comm.rank) % comm.world_size))
        early.append(exchange.finish().early)
        optimizer.step()
    check_replicas(comm, model.named_parameters())
    exchange.close()
    return model, early


def train_alone(workers: int) -> nn.Module:
    """The same training in float64 by one process on one batch that holds all workers' batches."""
    model = build(norm=False, dtype=torch.float64)
    optimizer = sgd(model)
    for step in range(STEPS):
        images, labels = zip(*(batch(step, worker) for worker in range(workers)), strict=True)
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.cat(images).double()), torch.cat(labels)).backward()
        optimizer.step()
    return model


def overflow(comm: Communicator, reduction: str) -> list[float]:
    """The loss scale after each of three steps, in the second of which the last rank has an infinite gradient."""
    model = build(norm=False)
    exchange = GradientExchange(model, comm, reduction=reduction, bucket_bytes=BUCKET_BYTES, judge=True)
    scale, values = LossScale(), []
    for step in range(3):
        with exchange.accumulate(last=True, scale=1 / scale.value):
            factor = float("inf") if step == 1 and comm.rank == comm.world_size - 1 else 1.0
            (scale.scale(loss_of(model, step, comm.rank)) * factor).backward()
        verdict = exchange.finish().verdict
        assert verdict is not None
        scale.update(verdict.finite)
        values.append(scale.value)
    exchange.close()
    return values


def divergence(comm: Communicator) -> str:
    model = build(norm=False)
    if comm.rank == 1:
        with torch.no_grad():
            next(model.parameters())[0, 0, 0, 0] += 1e-3
    try:
        check_replicas(comm, model.named_parameters())
    except MachineError as error:
        return str(error)
    return ""


def results(comm: Communicator) -> dict[str, Any]:
    found: dict[str, Any] = {"overflow": {}, "divergence": divergence(comm)}
    for reduction in ("engine", "ordered"):
        normed, _ = train(comm, reduction, norm=True)
        average_buffers(comm, normed)
        plain, early = train(comm, reduction, norm=False)
        accumulated, _ = train(comm, reduction, norm=False, accumulation=2)
        found[reduction] = {
            "bits": digest([*normed.parameters(), *normed.buffers()]),
            "early": early,
            "to_one_batch": distance(plain, train_alone(comm.world_size)),
            "accumulated_to_one_batch": distance(accumulated, train_alone(2 * comm.world_size)),
        }
        found["overflow"][reduction] = overflow(comm, reduction)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    engine = parser.parse_args().engine
    torch.set_num_threads(1)
    comm = registry.create(engine, detect(os.environ), torch.device("cpu"), timeout_s=30)
    report(results(comm))
    comm.close()


if __name__ == "__main__":
    main()
