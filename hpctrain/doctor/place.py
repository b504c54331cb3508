"""What one rank of a job tells of its place: host, GPU, cores, network card, and the code that it runs.

Facts only, each taken where the rank runs; what is wrong with the places of all ranks together is for ``judge``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hpctrain
from hpctrain.topology.network import interface_towards
from hpctrain.topology.placement import node_name, number_in
from hpctrain.topology.ranks import Topology

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank's place. ``node`` is the host's name in Slurm's lists; ``gpus`` the UUIDs in sight, ``gpu`` that in use.

    ``gpus_allotted`` and ``cores_allotted`` are what the job has of the host, ``cores`` the numbers of those this
    rank is bound to, as Linux and Slurm count them: hardware threads, of which ``physical_cores`` may have several.
    ``threads`` are how many it was asked to use. ``card`` is the interface towards rank 0.
    """

    rank: int
    host: str
    node: str
    local_rank: int
    gpu: str
    gpus: tuple[str, ...]
    gpus_allotted: int
    cores: tuple[int, ...]
    physical_cores: int
    cores_allotted: int
    threads: int
    numa: tuple[int, ...]
    card: str
    code: Mapping[str, str]


def own_place(topology: Topology, device: torch.device, first_host: str, threads: int | None) -> RankPlace:
    """The place of this process. ``first_host`` is that of rank 0, ``threads`` what data.threads says."""
    cores = sorted(os.sched_getaffinity(0))
    on_gpu = device.type == "cuda"
    sight = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return RankPlace(
        rank=topology.rank,
        host=topology.host,
        node=node_name(topology.host),
        local_rank=topology.local_rank,
        gpu=_uuid(device.index or 0) if on_gpu else "",
        gpus=tuple(_uuid(index) for index in range(sight)),
        gpus_allotted=number_in("SLURM_GPUS_ON_NODE"),
        cores=tuple(cores),
        physical_cores=physical_cores(cores),
        cores_allotted=min(number_in("SLURM_CPUS_ON_NODE") or 1 << 30, os.cpu_count() or len(cores)),
        threads=max(threads or 1, number_in("OMP_NUM_THREADS"), 1),
        numa=numa_nodes(cores),
        card=card_towards(first_host),
        code=code_version(),
    )


def _uuid(index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def physical_cores(cores: Sequence[int], root: Path = _CPUS) -> int:
    """How many cores the hardware threads ``cores`` belong to; each to its own where the kernel does not tell."""
    return len({_siblings(root / f"cpu{core}/topology/thread_siblings_list") or str(core) for core in cores})


def _siblings(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def numa_nodes(cores: list[int], root: Path = _NODES) -> tuple[int, ...]:
    """Numbers of the NUMA nodes that ``cores`` belong to; none where the kernel does not tell."""
    wanted = set(cores)
    found = []
    for path in root.glob("node[0-9]*"):
        try:
            listed = (path / "cpulist").read_text()
        except OSError:
            continue
        spans = re.findall(r"(\d+)(?:-(\d+))?", listed)
        if any(wanted & set(range(int(first), int(last or first) + 1)) for first, last in spans):
            found.append(int(path.name.removeprefix("node")))
    return tuple(sorted(found))


def card_towards(host: str) -> str:
    """The interface by which ``host`` is reached, and the InfiniBand devices beside it; empty where it is not."""
    try:
        name = interface_towards(host)
    except OSError:
        return ""
    infiniband = sorted(path.name for path in _INFINIBAND.glob("*"))
    return ", ".join([*([name] if name else []), *infiniband])


def code_version() -> dict[str, str]:
    """What must be the same on all hosts: versions, and a digest of this package's files."""
    root = Path(hpctrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.conf") for path in root.rglob(kind)):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "hpctrain": hpctrain.__version__,
        "its files (digest)": digest.hexdigest()[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
