"""The engines by name: which there are, which works here, and how to start one. Each is imported when asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from hpctrain.comm.base import Communicator
from hpctrain.errors import UserError
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology, place

#: each module has ``probe() -> Probe`` and ``boot(topology, device, timeout_s) -> Communicator``
ENGINES = {
    "horovod": "hpctrain.comm.horovod_engine",
    "mpi": "hpctrain.comm.mpi_engine",
    "torch": "hpctrain.comm.torch_engine",
    "serial": "hpctrain.comm.serial",
}
#: what auto tries in turn, by launcher
_PREFERENCES = {
    "none": ("serial",),
    "torchrun": ("torch",),
    "horovodrun": ("horovod", "torch"),
    "mpirun": ("horovod", "mpi", "torch"),
    "mpiexec": ("horovod", "mpi", "torch"),
    "srun": ("horovod", "mpi", "torch"),
}
_CPU = torch.device("cpu")


def probe(name: str) -> Probe:
    """What engine ``name`` says of itself; UserError for a name there is not."""
    answer: Probe = _module(name).probe()
    return answer


def choose(requested: str, topology: Topology, device: torch.device = _CPU) -> tuple[str, str]:
    """The engine to start and why: the requested one, or for ``auto`` the first that is fit under this launcher.

    Raises UserError when the name is unknown, or when no engine is fit.
    """
    if requested != "auto":
        _module(requested)
        return requested, "asked for by comm.engine"
    under = f"under {topology.launcher}" if topology.launcher != "none" else "without a launcher"
    passed_over = ""
    for name in _PREFERENCES[topology.launcher]:
        flaw = _flaw(probe(name), topology, device)
        if flaw is None:
            return name, f"auto {under}{passed_over}"
        passed_over += f"; not {name}: {flaw}"
    raise UserError(f"no engine is fit {under}{passed_over}: see `hpctrain doctor`")


def create(name: str, topology: Topology, device: torch.device, timeout_s: float) -> Communicator:
    """Start engine ``name`` for all ranks, and correct the topology by the hosts they run on.

    ``timeout_s`` bounds a collective where the engine can keep such a limit. Collective.

    Raises UserError for an unknown or unavailable engine, and when its world is not the launcher's.
    """
    answer = probe(name)
    if not answer.ok:
        others = [other for other in ENGINES if other != name and probe(other).ok]
        raise UserError(
            f"the {name} engine does not work here ({answer.reason}): {answer.remedy}; available: {', '.join(others)}"
        )
    comm: Communicator = _module(name).boot(topology, device, timeout_s)
    comm.topology = place(comm.topology, comm.all_gather_object(topology.host))
    return comm


def _module(name: str) -> ModuleType:
    if name not in ENGINES:
        raise UserError(f"there is no engine {name!r}: set comm.engine to auto or one of {', '.join(ENGINES)}")
    return importlib.import_module(ENGINES[name])


def _flaw(answer: Probe, topology: Topology, device: torch.device) -> str | None:
    """Why auto passes over an engine, or None."""
    if not answer.ok:
        return answer.reason
    if device.type == "cuda" and answer.name != "serial" and "NCCL" not in answer.built_with:
        return "built without NCCL"
    needed = {"horovodrun": "gloo", "mpirun": "MPI", "mpiexec": "MPI"}.get(topology.launcher)
    if answer.name == "horovod" and needed is not None and needed not in answer.built_with:
        return f"built without {needed}"
    return None
