"""Gradients as a backward pass delivers them, without a model's compute: what every competitor exchanges.

The parameters of a real net, and prepared gradients that autograd hands over one by one, the last registered
parameter first, so that hooks fire as in training. Their values are a function of seed, rank and step, so that any
rank knows the mean of all without a message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.config.schema import Config
from hpctrain.models.registry import build_model

#: different gradients of a rank; the same ones come again in other places
_POOL = 1 << 20
#: standard deviation of all gradients, in fp16's normal range
_DEVIATION = 1e-2
# Primes that divide no power of two: where a tensor's gradient of a step begins in the pool.
_STRIDE_OF_STEP, _STRIDE_OF_TENSOR = 7919, 104_729
#: elements that are compared at once
_CHUNK = 1 << 20
#: classes where neither the configuration nor a data set tells, as of synthetic pictures
_CLASSES = 1000

Shape = tuple[int, ...]


def tensor_list(config: Config) -> list[tuple[str, Shape]]:
    """Name and shape of each parameter of the configured net, in the order of registration."""
    with torch.device("meta"):
        model = build_model(
            config.model,
            num_classes=config.data.num_classes or _CLASSES,
            in_channels=config.data.channels,
            image_size=config.data.image_size,
        )
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


class Noise:
    """The gradients of all ranks: element i of tensor t in step s lies at (s * a + t * b + i) of a rank's pool."""

    def __init__(self, seed: int, rank: int, world_size: int, device: torch.device) -> None:
        total = torch.zeros(_POOL, dtype=torch.float64)
        for number in range(world_size):
            pool = _pool(seed, number)
            total += pool
            if number == rank:
                self._mine = pool.to(device)
        self._mean = (total / world_size).to(device)

    def fill(self, gradient: Tensor, step: int, index: int) -> None:
        """Write this rank's gradient of tensor number ``index`` in ``step`` to ``gradient`` [n]."""
        for part, source in self._parts(gradient, self._mine, step, index):
            part.copy_(source)

    def error(self, mean: Tensor, step: int, index: int) -> float:
        """Norm of the difference between ``mean`` [n] and the true mean in float64, over the norm of the latter."""
        apart = true = 0.0
        for part, source in self._parts(mean, self._mean, step, index):
            apart += float((part.double() - source).square().sum())
            true += float(source.square().sum())
        return math.sqrt(apart / true)

    def _parts(self, flat: Tensor, pool: Tensor, step: int, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        start = (step * _STRIDE_OF_STEP + index * _STRIDE_OF_TENSOR) % _POOL
        done = 0
        while done < flat.numel():
            length = min(_CHUNK, _POOL - start, flat.numel() - done)
            yield flat[done : done + length], pool[start : start + length]
            done, start = done + length, (start + length) % _POOL


def _pool(seed: int, rank: int) -> Tensor:
    # On the host, since generators of other devices draw other numbers.
    generator = torch.Generator().manual_seed(seed * 65_537 + rank)
    return torch.randn(_POOL, generator=generator) * _DEVIATION


@dataclass(frozen=True)
class Prepared:
    """What a process's competitors share: one copy of values and gradients, ``names`` and ``shapes`` of tensors."""

    names: list[str]
    shapes: list[Shape]
    values: list[Tensor]
    gradients: list[Tensor]
    noise: Noise

    @classmethod
    def make(cls, tensors: Sequence[tuple[str, Sequence[int]]], noise: Noise, device: torch.device) -> Prepared:
        shapes = [tuple(shape) for _, shape in tensors]
        values, gradients = ([torch.zeros(shape, device=device) for shape in shapes] for _ in range(2))
        return cls([name for name, _ in tensors], shapes, values, gradients, noise)

    def fill(self, step: int) -> None:
        """Lay this rank's gradients of ``step`` ready: an exchange in place has overwritten the last ones."""
        for index, gradient in enumerate(self.gradients):
            self.noise.fill(gradient.view(-1), step, index)


class _Deliver(torch.autograd.Function):
    """Passes ``carry`` on; in the backward pass ``gradient`` becomes that of ``parameter``."""

    @staticmethod
    def forward(ctx: Any, carry: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return carry.view_as(carry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        # A tensor of its own over the same memory: autograd then takes it as .grad, and copies nothing.
        return gradients[0], ctx.gradient.detach(), None


class Delivery(nn.Module):
    """The parameters of a net without the net. ``forward()`` gives a loss whose backward pass delivers."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        self.prepared = prepared
        for name, value in zip(prepared.names, prepared.values, strict=True):
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(last, nn.Parameter(value))
        named = dict(self.named_parameters())
        self.ordered = [named[name] for name in prepared.names]
        # No buffer, which DDP would broadcast before each pass.
        self._start = torch.zeros((), device=self.ordered[0].device)

    def forward(self) -> Tensor:
        carry = self._start
        for parameter, gradient in zip(self.ordered, self.prepared.gradients, strict=True):
            carry = _Deliver.apply(carry, parameter, gradient)  # type: ignore[no-untyped-call]
        return carry

    def prepare(self, step: int) -> None:
        """Forget the last gradients and lay those of ``step`` ready."""
        for parameter in self.ordered:
            parameter.grad = None
        self.prepared.fill(step)

    def worst(self, step: int) -> tuple[float, str]:
        """The largest relative error of a tensor's ``.grad`` as mean of ``step``, and that tensor's name.

        A gradient that is missing or not a number counts as infinitely wrong.
        """
        found = (0.0, self.prepared.names[0])
        for index, (name, parameter) in enumerate(zip(self.prepared.names, self.ordered, strict=True)):
            gradient = parameter.grad
            error = math.inf if gradient is None else self.prepared.noise.error(gradient.reshape(-1), step, index)
            found = max(found, (math.inf if math.isnan(error) else error, name))
        return found
