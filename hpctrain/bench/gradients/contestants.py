"""What each competitor does in its ranks: how it gets a process ready, and how it takes gradients to their mean.

Every one is called as its own documentation shows. All get the same treatment around that: gradients as they come,
`.grad` of None before, freed memory kept by the C library as in `hpctrain train`, cores not bound.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpctrain.bench.gradients.delivery import Delivery
from hpctrain.bench.gradients.groups import Group, group_named
from hpctrain.comm import horovod_engine, horovod_settings, mpi_engine, registry, torch_engine
from hpctrain.comm.base import Communicator
from hpctrain.config.schema import Config, GradientsConfig
from hpctrain.gradients.build import build_exchange
from hpctrain.metrics.clock import synchronise
from hpctrain.topology.ranks import Topology
from hpctrain.train.session import choose_device, keep_freed_memory


@dataclass(frozen=True)
class Contestant:
    """One competitor in one format: ``forward`` gives a loss, ``finish(loss)`` is what is timed."""

    delivery: Delivery
    finish: Callable[[Tensor], object]
    forward: Callable[[], Tensor]
    close: Callable[[], object] = lambda: None
    #: what it chose by itself
    how: str = ""


#: gets a competitor ready: the net's parameters, a name, and what the configuration says of gradients
Enter = Callable[[Delivery, str, GradientsConfig], Contestant]


@dataclass(frozen=True)
class World:
    """A competitor's library, running."""

    barrier: Callable[[], object]
    close: Callable[[], object]
    enter: Enter
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A rank in a competitor's world."""

    device: torch.device
    world: World

    def enter(self, delivery: Delivery, name: str, gradients: Mapping[str, Any]) -> Contestant:
        return self.world.enter(delivery, name, GradientsConfig.model_validate(gradients))

    def synchronise(self) -> None:
        synchronise(self.device)

    def barrier(self) -> None:
        self.world.barrier()

    def close(self) -> None:
        self.world.close()

    @property
    def versions(self) -> dict[str, str]:
        return dict(self.world.versions)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def open_place(name: str, topology: Topology, config: Config, limit_s: float) -> Place | str:
    """Join the world of group ``name``, or say why it cannot be had here.

    Raises UserError where configuration or environment ask for what the group cannot do.
    """
    group = group_named(name)
    answer = registry.probe(group.engine)
    if not answer.ok:
        return answer.reason
    device = choose_device(config.train.device, topology)
    needed = "NCCL" if device.type == "cuda" and name != "mpi4py_naive" else group.part
    if needed not in answer.built_with:
        return f"{group.engine} is built without {needed}"
    if device.type == "cuda" and topology.world_size > torch.cuda.device_count():
        # NCCL refuses two ranks on one GPU of one host; as two hosts they talk through sockets.
        os.environ.setdefault("NCCL_HOSTID", f"rank-{topology.rank}")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if group.key is None and group.engine == "horovod":
        horovod_settings.ask_for(group.engine, device, config.comm.horovod.model_dump())
    keep_freed_memory()
    open_world = _WORLDS.get(name, _open_ours)
    return Place(device, open_world(group, topology, device, limit_s))


def backward(loss: Tensor) -> None:
    """The backward pass alone."""
    loss.backward()  # type: ignore[no-untyped-call]


def _open_ours(group: Group, topology: Topology, device: torch.device, limit_s: float) -> World:
    comm = registry.create(group.engine, topology, device, limit_s)

    def enter(delivery: Delivery, name: str, gradients: GradientsConfig) -> Contestant:
        exchange = build_exchange(delivery, comm, gradients)
        transport = exchange.transport

        def finish(loss: Tensor) -> None:
            with exchange.accumulate(last=True):
                backward(loss)
            exchange.finish()

        how = f"reduction {transport.name} ({transport.reason})"
        return Contestant(delivery, finish, delivery, exchange.close, how)

    return World(comm.barrier, comm.close, enter, comm.versions())


def _open_horovod(group: Group, topology: Topology, device: torch.device, limit_s: float) -> World:
    horovod_settings.require_released()
    os.environ.pop(horovod_settings.FUSION_THRESHOLD, None)
    hvd = horovod_engine.join(topology)

    def enter(delivery: Delivery, name: str, gradients: GradientsConfig) -> Contestant:
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(delivery.parameters(), lr=0.1),
            # Names are Horovod's own affair, but it wants them to differ between optimizers.
            named_parameters=[(f"{name}.{key}", parameter) for key, parameter in delivery.named_parameters()],
            compression=hvd.Compression.fp16 if _is_narrow(gradients) else hvd.Compression.none,
        )

        def finish(loss: Tensor) -> None:
            backward(loss)
            optimizer.synchronize()

        return Contestant(delivery, finish, delivery)

    return World(hvd.barrier, hvd.shutdown, enter, horovod_engine.probe().versions)


def _open_ddp(group: Group, topology: Topology, device: torch.device, limit_s: float) -> World:
    comm = registry.create(group.engine, topology, device, limit_s)

    def enter(delivery: Delivery, name: str, gradients: GradientsConfig) -> Contestant:
        model = torch_engine.wrap_released(delivery, fp16=_is_narrow(gradients))
        return Contestant(delivery, backward, model)

    return World(comm.barrier, comm.close, enter, comm.versions())


def _open_naive(group: Group, topology: Topology, device: torch.device, limit_s: float) -> World:
    mpi = mpi_engine.start_mpi()
    # Open MPI sums numpy's float16 too, but this operator is faster by a factor of three.
    comm, (half, half_sum) = mpi.COMM_WORLD, mpi_engine.half_sum(mpi, torch.float16)

    def enter(delivery: Delivery, name: str, gradients: GradientsConfig) -> Contestant:
        narrow = _is_narrow(gradients)

        def finish(loss: Tensor) -> None:
            backward(loss)
            for parameter in delivery.parameters():
                assert parameter.grad is not None
                # Through the host on a GPU: whether an MPI takes device memory is not known.
                sent = parameter.grad.half().cpu() if narrow else parameter.grad.cpu()
                message = [sent.view(-1).view(torch.uint8).numpy(), sent.numel(), half if narrow else mpi.FLOAT]
                comm.Allreduce(mpi.IN_PLACE, message, half_sum if narrow else mpi.SUM)
                parameter.grad.copy_(sent)
                parameter.grad.div_(comm.size)

        return Contestant(delivery, finish, delivery)

    return World(comm.Barrier, comm.Barrier, enter, mpi_engine.probe().versions)


def _open_chainermn(group: Group, topology: Topology, device: torch.device, limit_s: float) -> World:
    comm = registry.create(group.engine, topology, device, limit_s)

    def enter(delivery: Delivery, name: str, gradients: GradientsConfig) -> Contestant:
        finish = pack_after_backward(delivery, comm, torch.float16 if _is_narrow(gradients) else torch.float32)
        return Contestant(delivery, finish, delivery)

    return World(comm.barrier, comm.close, enter, comm.versions())


def pack_after_backward(delivery: Delivery, comm: Communicator, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """As ChainerMN's pure_nccl communicator: pack, all-reduce, divide in the format of the wire, unpack.

    Akiba et al. 2017 ("ChainerMN: Scalable Distributed Deep Learning Framework") with the narrow buffer of Akiba,
    Suzuki and Fukuda 2017 ("Extremely Large Minibatch SGD").
    """
    parameters = list(delivery.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.empty(sum(sizes), dtype=dtype, device=comm.device)
    views = [part.view_as(like) for part, like in zip(torch.split(flat, sizes), parameters, strict=True)]

    @torch.no_grad()
    def finish(loss: Tensor) -> None:
        backward(loss)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_copy_(views, gradients)
        comm.all_reduce_(flat).wait()
        flat.div_(comm.world_size)
        torch._foreach_copy_(gradients, views)

    return finish


def _is_narrow(gradients: GradientsConfig) -> bool:
    return gradients.compression != "none"


_WORLDS: dict[str, Callable[[Group, Topology, torch.device, float], World]] = {
    "horovod_mpi": _open_horovod,
    "horovod_gloo": _open_horovod,
    "ddp": _open_ddp,
    "mpi4py_naive": _open_naive,
    "chainermn_style": _open_chainermn,
}
