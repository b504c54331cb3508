"""What is wrong with the places of a job's ranks, taken together: sentences, each with its remedy.

Pure functions of what all ranks told; equal on every rank, so that all come to the same end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpctrain.doctor.clocks import Reading, certain_difference_s
from hpctrain.doctor.place import RankPlace
from hpctrain.topology.voice import listed

_CLOCKS_APART_S = 1.0
_MOST_NAMED = 4


def complaints(places: Sequence[RankPlace], device: str) -> list[str]:
    """All that must be mended before training; ``device`` is what train.device asks for."""
    told = [*_different_code(places)]
    for host in dict.fromkeys(place.host for place in places):
        mine = [place for place in places if place.host == host]
        told += [*_gpus(host, mine, device), *_cores(host, mine)]
    return told


def clock_faults(places: Sequence[RankPlace], readings: Sequence[Reading]) -> Iterator[str]:
    """A sentence for each host whose clock differs from that of rank 0's by more than a second."""
    first: dict[str, RankPlace] = {}
    for place in places:
        first.setdefault(place.host, place)
    for host, place in first.items():
        ahead_s = certain_difference_s(readings, place.rank, 0)
        if abs(ahead_s) > _CLOCKS_APART_S:
            yield (
                f"the clock of host {host} is {abs(ahead_s):.1f} s or more {'ahead of' if ahead_s > 0 else 'behind'} "
                f"that of {places[0].host}: have it set (chrony or ntpd), or leave it out with --exclude={place.node}"
            )


def unshared(places: Sequence[RankPlace], seen: Sequence[bool], folder: str) -> Iterator[str]:
    """A sentence when some ranks did not find in the run directory what rank 0 had written there."""
    blind = list(dict.fromkeys(place.host for place, found in zip(places, seen, strict=True) if not found))
    if blind:
        yield (
            f"the run directory {folder} is not shared: what rank 0 wrote on host {places[0].host} cannot be read "
            f"on {_some(blind)}: put it on a file system of all nodes (HPCTRAIN_RUNS, or --run-dir)"
        )


def locked_twice(places: Sequence[RankPlace], locked: Sequence[bool], folder: str) -> Iterator[str]:
    """A sentence when some ranks were given a lock that rank 0 held on another host."""
    given = list(dict.fromkeys(place.host for place, lock in zip(places, locked, strict=True) if lock))
    if given:
        yield (
            f"a lock in the run directory {folder} counts on its own host only, as {_some(given)} showed, so that two "
            "jobs may train in it at once: give each its own --run-dir, or have the file system mounted with locks for "
            "all hosts (Lustre: flock, not localflock; NFS: local_lock=none)"
        )


def _different_code(places: Sequence[RankPlace]) -> Iterator[str]:
    first = places[0]
    for key, value in first.code.items():
        theirs = {place.host: str(place.code.get(key)) for place in places if place.code.get(key) != value}
        if theirs:
            yield (
                f"hosts {first.host} and {_some(list(theirs))} run different code: {key} is {value} and "
                f"{_some(sorted(set(theirs.values())))}: install one environment where all nodes see it, or the "
                "same on each"
            )


def _gpus(host: str, places: Sequence[RankPlace], device: str) -> Iterator[str]:
    used: dict[str, list[int]] = {}
    for place in places:
        if place.gpu:
            used.setdefault(place.gpu, []).append(place.rank)
    for gpu, ranks in used.items():
        if len(ranks) > 1:
            yield (
                f"ranks {_some(ranks)} on host {host} share {gpu}: start one rank a GPU (--ntasks-per-node), and let "
                "each see all of them (--gpu-bind=none)"
            )
    there = max(len({gpu for place in places for gpu in place.gpus}), *(place.gpus_allotted for place in places))
    if device == "cpu" or there <= len(used):
        return
    if not used:
        yield (
            f"host {host} has {there} GPUs in this job, but its ranks train on CPUs: see in `hpctrain doctor` why "
            "torch sees none, or set train.device=cpu"
        )
    elif all(len(ranks) == 1 for ranks in used.values()):
        yield (
            f"host {host} has {there} GPUs in this job, but its ranks use {len(used)}: start {there} ranks a node "
            f"(--ntasks-per-node={there}), or ask for fewer GPUs"
        )


def _cores(host: str, places: Sequence[RankPlace]) -> Iterator[str]:
    allotted = min(place.cores_allotted for place in places)
    share = allotted // len(places)
    # A core with several hardware threads is as many of Slurm's CPUs, but one core.
    bound = [place for place in places if place.physical_cores == 1 and len(place.cores) < share]
    alone = [place for place in places if len(place.cores) == 1]
    if bound:
        yield (
            f"ranks {_some([place.rank for place in bound])} on host {host} are bound to one core each, where each "
            f"could have {share} CPUs: add --cpus-per-task={share} to srun, or --bind-to none to mpirun"
        )
    elif alone and (alone[0].gpu or max(place.threads for place in alone) > 1):
        yield (
            f"ranks {_some([place.rank for place in alone])} on host {host} have one core each for training and "
            f"loading, of {allotted}: ask for more with --cpus-per-task, or set data.threads and OMP_NUM_THREADS to 1"
        )
    union = {core for place in places for core in place.cores}
    if len(union) < min(allotted, sum(len(place.cores) for place in places)) and len(places) > 1:
        yield (
            f"the {len(places)} ranks of host {host} share {len(union)} of its {allotted} cores: "
            f"add --cpus-per-task={max(1, share)} to srun, or --bind-to none to mpirun"
        )


def _some(names: Sequence[object]) -> str:
    return listed(names, _MOST_NAMED)
