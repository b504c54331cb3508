"""Where the ranks of a job meet when their launcher does not say: an address and a port all of them can derive.

Used by the torch engine outside torchrun; engines with a launcher of their own need none of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from hpctrain.errors import UserError
from hpctrain.topology.hosts import first_host
from hpctrain.topology.ranks import Topology

# Below Linux' ephemeral ports (from 32768), which any client may be given at any moment.
_FIRST_PORT, _NUM_PORTS = 15000, 15000
#: what names one launch, one variable or a pair each; the first that is set counts
_JOB_NAMES = (
    ("PMIX_NAMESPACE",),
    ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ("PMI_JOBID",),
)


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Rank 0 listens at ``host:port``; ``job`` tells this launch from others on the same machine."""

    host: str
    port: int
    job: str


def rendezvous(environ: Mapping[str, str], topology: Topology) -> Rendezvous:
    """MASTER_ADDR and MASTER_PORT where set; else Slurm's first node or, on one host, loopback.

    Raises UserError when the ranks span hosts that only the launcher knows, or when the launch has no name.
    """
    job = _job(environ)
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if port is not None and (not port.isdecimal() or not 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT={port!r} is not a port: set it to a number from 1 to 65535")
    if host is None:
        host = _first_host(environ, topology)
    if host is None or (port is None and job is None):
        raise UserError(
            f"{topology.launcher} tells its ranks no address to meet at: export MASTER_ADDR (the host of rank 0) and "
            "MASTER_PORT to all ranks, start it with torchrun, or set comm.engine=mpi"
        )
    number = int(port) if port else _FIRST_PORT + zlib.crc32(str(job).encode()) % _NUM_PORTS
    return Rendezvous(host, number, job or f"{host}:{number}")


def _job(environ: Mapping[str, str]) -> str | None:
    for names in _JOB_NAMES:
        if all(environ.get(name) for name in names):
            return "-".join(environ[name] for name in names)
    return None


def _first_host(environ: Mapping[str, str], topology: Topology) -> str | None:
    if topology.local_size == topology.world_size and topology.launcher != "srun":
        return "127.0.0.1"
    # srun gives rank 0 to the first node of the step, unless asked for an arbitrary distribution.
    if topology.launcher == "srun" and environ.get("SLURM_DISTRIBUTION") != "arbitrary":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        return first_host(nodes)
    return None
