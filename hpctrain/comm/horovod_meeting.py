"""How Horovod's ranks find each other over Gloo when srun started them: what horovodrun would have told each of them.

Nothing here imports Horovod; its rendezvous server is handed in.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpctrain.errors import MachineError
from hpctrain.topology.network import interface_towards
from hpctrain.topology.ranks import Topology, place

CONTROLLER = "HOROVOD_CONTROLLER"
_INTERFACE = "HOROVOD_GLOO_IFACE"


def is_needed(topology: Topology, environ: Mapping[str, str], *, over_mpi: bool) -> bool:
    """Whether these ranks have to be told: under srun, where Gloo is asked for or MPI would find nobody.

    MPI meets through PMIx (srun --mpi=pmix); ``over_mpi`` says whether Horovod was built with MPI at all.
    """
    if topology.launcher != "srun" or topology.world_size == 1:
        return False
    if controller := environ.get(CONTROLLER):
        return controller.lower() == "gloo"
    return not over_mpi or "PMIX_NAMESPACE" not in environ


def meet(store: Any, topology: Topology, serve: Callable[[], int], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that Horovod reads when it starts. Collective, over the torch ``store`` that all ranks share.

    ``serve`` starts Horovod's rendezvous server, on rank 0, and returns its port.
    """
    store.set(f"host/{topology.rank}", topology.host)
    if topology.rank == 0:
        hosts = [store.get(f"host/{rank}").decode() for rank in range(topology.world_size)]
        store.set("all", json.dumps([serve(), hosts]))
    port, hosts = json.loads(store.get("all"))
    # Rank 0 serves the store too, and must not leave before the last has read.
    if store.add("read", 1) == topology.world_size:
        store.set("over", "")
    store.get("over")
    others = [host for host in hosts if host != topology.host]
    return {
        **_places(place(topology, hosts), hosts),
        CONTROLLER: "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": hosts[0],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        _INTERFACE: environ.get(_INTERFACE) or interface_to(others[0] if others else "127.0.0.1"),
    }


def _places(topology: Topology, hosts: Sequence[str]) -> dict[str, str]:
    """Rank tables as horovodrun writes them: "cross" counts the hosts that have a rank of this local rank."""
    across = [host for host in dict.fromkeys(hosts) if hosts.count(host) > topology.local_rank]
    numbers = {
        "RANK": topology.rank,
        "SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_SIZE": topology.local_size,
        "CROSS_RANK": across.index(topology.host),
        "CROSS_SIZE": len(across),
    }
    return {"HOROVOD_HOSTNAME": topology.host, **{f"HOROVOD_{name}": str(value) for name, value in numbers.items()}}


def interface_to(host: str) -> str:
    """The name of this host's network interface on the way to ``host``; MachineError where there is no way."""
    try:
        name = interface_towards(host, socket.AF_INET)
    except OSError as error:
        raise MachineError(f"{socket.gethostname()} has no way to {host}: {error.strerror or error}") from error
    if name is None:
        raise MachineError(f"no network interface of {socket.gethostname()} has the address that leads to {host}")
    return name
