"""The mean of a ResNet's gradients over up to 1,024 workers, each in two bytes, summed as a ring and as a tree do.

Simulated ranks, real pictures: the gradients of a CIFAR ResNet-20 on handwritten digits, mixed anew for each worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.config.schema import ResNetConfig
from hpctrain.gradients.scale import HEADROOM, wire_scale
from hpctrain.kernels.base import Piece
from hpctrain.kernels.registry import kernels_for
from hpctrain.models.registry import build_model
from tests.needs import needs

needs("sklearn")

KERNELS = kernels_for(torch.device("cpu"))
BATCHES = 6


@dataclass(frozen=True)
class Recorded:
    """Flat gradients of a few batches [batches, n], and where each tensor begins and ends."""

    batches: Tensor
    spans: list[slice]

    def of_worker(self, worker: int, scale: float) -> Tensor:
        """A mixture of the batches' gradients [n]: what they share, and noise that is the worker's own."""
        generator = torch.Generator().manual_seed(worker)
        weights = torch.randn(BATCHES, generator=generator) + 0.25
        return (weights @ self.batches) * scale


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    from sklearn.datasets import load_digits

    torch.manual_seed(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    model: nn.Module = build_model(ResNetConfig(name="resnet20"), num_classes=10, in_channels=1, image_size=8)
    # The largest tensors tell nothing that these do not, and take most of the time.
    small = [p for p in model.parameters() if p.numel() < 10_000]
    rows = []
    for number in range(BATCHES):
        part = slice(32 * number, 32 * number + 32)
        model.zero_grad()
        functional.cross_entropy(model(images[part]), labels[part]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in small if p.grad is not None]))
    sizes = [p.numel() for p in small]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return Recorded(torch.stack(rows), [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)])


def ring(total: Tensor, sent: Tensor, worker: int) -> None:
    """What a ring does to a chunk: each rank adds its own to what it was handed, and rounds."""
    total.copy_(sent) if worker == 0 else total.add_(sent)


def in_float32(total: Tensor, sent: Tensor, worker: int) -> None:
    """What `ordered` does, but for the order: sums wide, and rounds once in the end."""
    total.copy_(sent) if worker == 0 else total.add_(sent.float())


@pytest.mark.parametrize(("workers", "scale"), [(2, 300.0), (3, 1.0), (64, 1e-8), (1024, 300.0), (1024, 1e-8)])
@pytest.mark.parametrize("add", [ring, in_float32])
def test_every_tensors_mean_is_right_to_one_percent(
    recorded: Recorded, workers: int, add: Callable[[Tensor, Tensor, int], None], scale: float
) -> None:
    n = recorded.batches.shape[1]
    exact = sum(recorded.of_worker(worker, scale).double() for worker in range(workers)) / workers
    assert isinstance(exact, Tensor)
    # As in training: the magnitude of a step before, which may have been four times smaller or larger.
    for drift in (0.25, 4.0) if workers < 1024 else (4.0,):
        factor = wire_scale(torch.float16, float(exact.abs().max()) * workers * drift)
        total = torch.empty(n, dtype=torch.float16 if add is ring else torch.float32)
        sent, lost = torch.empty(n, dtype=torch.float16), 0
        for worker in range(workers):
            values = recorded.of_worker(worker, scale)
            KERNELS.narrow([Piece(values, 0)], sent, factor)
            lost += int(((sent == 0) & (values != 0)).sum())
            add(total, sent, worker)
        mean = total.half().double() / factor / workers
        for span in recorded.spans:
            assert (mean[span] - exact[span]).norm() <= 0.01 * exact[span].norm()
        assert lost <= 0.01 * n * workers


@pytest.mark.parametrize("workers", [2, 3, 1024])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 300.0, 1e30])
def test_the_factor_is_a_power_of_two_that_leaves_the_sum_its_headroom(workers: int, magnitude: float) -> None:
    total = magnitude * workers
    factor = wire_scale(torch.float16, total)
    assert torch.frexp(torch.tensor(factor, dtype=torch.float64)).mantissa == 0.5
    if 1e-20 < magnitude < 1e20:
        assert 65504 / HEADROOM / 2 < factor * total <= 65504 / HEADROOM


@pytest.mark.parametrize("magnitude", [0.0, float("inf")])
def test_without_a_magnitude_there_is_no_factor(magnitude: float) -> None:
    assert wire_scale(torch.float16, magnitude) == 1.0


def test_types_of_full_range_need_none() -> None:
    assert wire_scale(torch.bfloat16, 1e-8) == wire_scale(torch.float32, 1e8) == 1.0
