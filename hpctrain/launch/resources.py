"""What `submit` was asked for, and the nodes, ranks, CPUs, GPUs, memory and time that come of it on a site.

What the site cannot give is refused here, before there is a job.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.launch.durations import seconds_of
from hpctrain.launch.site import Site
from hpctrain.launch.sizes import parse_size


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None where it was silent. ``more`` are sbatch's own options."""

    nodes: int
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    engine: str | None = None
    array: str | None = None
    time_limit: str | None = None
    job_name: str | None = None
    more: tuple[str, ...] = ()


def resources(site: Site, request: Request, config: Config) -> dict[str, str | int | None]:
    """sbatch's options for nodes, ranks, CPUs, GPUs, memory and time, checked against what the site gives."""
    gpus, tasks = _gpus_and_tasks(site, request, config)
    _check_size(site, request, tasks, config)
    cpus = site.need("cpus_per_node")
    if tasks > cpus:
        raise UserError(f"{tasks} ranks a node are more than its {cpus} CPUs ({site.path}): ask for fewer")
    # With a part of a node's GPUs goes as large a part of the rest: others may use it, and rates stay comparable.
    whole = site.gpus_per_node if gpus and site.gpus_per_node else tasks
    return {
        "nodes": request.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": max(1, cpus // whole),
        "gres": f"gpu:{gpus}" if gpus and site.gres == "gres" else None,
        "gpus-per-node": gpus if gpus and site.gres == "gpus" else None,
        "mem": _share(site.memory_per_node, tasks, whole) if site.memory_per_node else None,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": request.time_limit or site.max_time,
        "array": request.array,
    }


def _share(memory: str, part: int, whole: int) -> str:
    """``part`` of ``whole`` of a size that Slurm reads, whose plain numbers are MiB."""
    if part == whole:
        return memory
    size_bytes = parse_size(f"{memory}M" if memory.isdecimal() else memory, 1024)
    return f"{size_bytes * part // whole // 1024}K"  # type: ignore[operator]  # a size, as Site has checked


def _gpus_and_tasks(site: Site, request: Request, config: Config) -> tuple[int, int]:
    """GPUs and ranks of a node: one rank a GPU, or without GPUs as many ranks as asked for."""
    if site.need("gres") == "none":
        if request.gpus_per_node or config.train.device == "cuda":
            asked = "train.device=cuda" if not request.gpus_per_node else f"--gpus-per-node {request.gpus_per_node}"
            raise UserError(f"{site.path} is a site without GPUs, but {asked}: leave it out, or choose another --site")
        if request.tasks_per_node is None:
            raise UserError(f"{site.path} is a site without GPUs: say how many ranks a node has with --tasks-per-node")
        return 0, request.tasks_per_node
    there = site.need("gpus_per_node")
    gpus = there if request.gpus_per_node is None else request.gpus_per_node
    if not 1 <= gpus <= there:
        raise UserError(
            f"--gpus-per-node is {gpus}, but a node of {site.path} has {there}: ask for 1 to {there}, and for more "
            "with --nodes"
        )
    if request.tasks_per_node not in (None, gpus):
        raise UserError(
            f"--tasks-per-node is {request.tasks_per_node}, but each rank has a GPU of its own, and a node {gpus}: "
            "leave --tasks-per-node out"
        )
    return gpus, gpus


def _check_size(site: Site, request: Request, tasks: int, config: Config) -> None:
    if site.max_nodes is not None and request.nodes > site.max_nodes:
        raise UserError(
            f"--nodes is {request.nodes}, but {site.path} gives a job at most {site.max_nodes} (HPCTRAIN_MAX_NODES): "
            "ask for fewer"
        )
    if config.comm.engine == "serial" and request.nodes * tasks > 1:
        raise UserError(
            f"the serial engine is one process, but {request.nodes} x {tasks} ranks were asked for: set --engine to "
            "horovod, mpi or torch"
        )
    if request.array is not None and not re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*%1", request.array):
        raise UserError(
            f"--array is {request.array!r}, but its tasks take turns in one run directory: write it as 0-9%1, with %1 "
            "for one at a time"
        )
    limit = seconds_of(site.max_time, "HPCTRAIN_MAX_TIME") if site.max_time else math.inf
    if request.time_limit is not None and seconds_of(request.time_limit, "--time") > limit:
        raise UserError(
            f"--time is {request.time_limit}, but {site.path} gives a job at most {site.max_time} (HPCTRAIN_MAX_TIME): "
            "ask for less; a longer training goes on in the next job"
        )
