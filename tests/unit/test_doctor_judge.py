"""What is wrong with the places of a job: each fault is told with its remedy, and sound jobs have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.doctor.clocks import certain_difference_s
from hpctrain.doctor.judge import clock_faults, complaints, locked_twice, unshared
from hpctrain.doctor.place import RankPlace

CODE = {"hpctrain": "0.1.0", "torch": "2.13.0"}


def job(nodes: int, ranks_a_node: int, *, gpus: int = 0, cores: int = 32) -> list[RankPlace]:
    """A sound job: each rank on cores, and where there are ``gpus`` on a GPU, of its own."""
    share = cores // ranks_a_node
    return [
        RankPlace(
            rank=node * ranks_a_node + local,
            host=f"n{node}",
            node=f"gpu{node:02}",
            local_rank=local,
            gpu=f"GPU-{node}-{local}" if gpus else "",
            gpus=tuple(f"GPU-{node}-{index}" for index in range(gpus)),
            gpus_allotted=gpus,
            cores=tuple(range(local * share, (local + 1) * share)),
            physical_cores=share,
            cores_allotted=cores,
            threads=1,
            numa=(0,),
            card="eth0",
            code=CODE,
        )
        for node in range(nodes)
        for local in range(ranks_a_node)
    ]


@given(st.integers(1, 4), st.integers(1, 8), st.booleans(), st.sampled_from([16, 64]))
def test_sound_jobs_have_no_complaint(nodes: int, ranks: int, on_gpus: bool, cores: int) -> None:
    places = job(nodes, ranks, gpus=ranks if on_gpus else 0, cores=cores)
    assert complaints(places, "auto") == []
    unbound = [replace(place, cores=tuple(range(cores))) for place in places]
    assert complaints(unbound, "auto") == []


def test_one_core_a_rank_is_right_where_the_job_has_no_more() -> None:
    assert complaints(job(2, 4, cores=4), "cpu") == []
    two_threads = [replace(place, physical_cores=1, threads=2) for place in job(2, 4, cores=8)]
    assert complaints(two_threads, "cpu") == []


def changed(places: list[RankPlace], rank: int, **values: Any) -> list[RankPlace]:
    return [replace(place, **values) if place.rank == rank else place for place in places]


SHARED_GPU = changed(job(2, 2, gpus=2), 3, gpu="GPU-1-0")
HALF = [replace(place, gpus=("a", "b", "c", "d"), gpus_allotted=4) for place in job(1, 2, gpus=2)]
BLIND = [replace(place, gpu="", gpus=()) for place in job(1, 2, gpus=2)]
ONE_CORE = [replace(place, cores=(place.local_rank,), physical_cores=1) for place in job(1, 4)]
# What mpirun without --bind-to none makes of 56 cores of two hardware threads each.
ONE_OF_TWO_THREADS = [
    replace(place, cores=(place.local_rank, place.local_rank + 56), physical_cores=1) for place in job(1, 8, cores=112)
]
THREADS = [replace(place, threads=4) for place in job(1, 4, cores=4)]
CROWDED = [replace(place, cores=(0, 1)) for place in job(1, 4)]
OTHER_TORCH = changed(job(3, 1), 2, code={**CODE, "torch": "2.12.0"})
OTHER_TORCHES = [
    replace(place, code={**CODE, "torch": ("2.10.0" if place.rank == 4 else "2.12.0")}) if place.rank else place
    for place in job(7, 1)
]


@pytest.mark.parametrize(
    ("places", "device", "message"),
    [
        (SHARED_GPU, "auto", "ranks 2, 3 on host n1 share GPU-1-0: start one rank a GPU (--ntasks-per-node)"),
        (HALF, "cuda", "host n0 has 4 GPUs in this job, but its ranks use 2: start 4 ranks a node"),
        (BLIND, "auto", "host n0 has 2 GPUs in this job, but its ranks train on CPUs: see in `hpctrain doctor` why"),
        (
            ONE_CORE,
            "cpu",
            "ranks 0, 1, 2, 3 on host n0 are bound to one core each, where each could have 8 CPUs: add "
            "--cpus-per-task=8 to srun, or --bind-to none to mpirun",
        ),
        (
            ONE_OF_TWO_THREADS,
            "cpu",
            "0, 1, 2, 3 and 4 more on host n0 are bound to one core each, where each could have",
        ),
        (THREADS, "cpu", "ranks 0, 1, 2, 3 on host n0 have one core each for training and loading, of 4: ask for more"),
        (job(1, 4, gpus=4, cores=4), "cuda", "have one core each for training and loading, of 4"),
        (CROWDED, "cpu", "the 4 ranks of host n0 share 2 of its 32 cores: add --cpus-per-task=8 to srun"),
        (
            OTHER_TORCHES,
            "cpu",
            "hosts n0 and n1, n2, n3, n4 and 2 more run different code: torch is 2.13.0 and 2.10.0, 2.12.0: install",
        ),
        (OTHER_TORCH, "cpu", "hosts n0 and n2 run different code: torch is 2.13.0 and 2.12.0: install one environment"),
    ],
)
def test_each_fault_is_one_sentence(places: list[RankPlace], device: str, message: str) -> None:
    (told,) = complaints(places, device)
    assert message in told


def test_gpus_may_idle_where_cpus_are_asked_for() -> None:
    assert complaints(BLIND, "cpu") == []


def test_many_ranks_are_counted_not_listed() -> None:
    places = [replace(place, cores=(0,), physical_cores=1) for place in job(1, 16)]
    assert complaints(places, "cpu")[0].startswith("ranks 0, 1, 2, 3 and 12 more on host n0")


def test_a_folder_that_some_hosts_do_not_see_is_named() -> None:
    places = job(3, 2)
    assert list(unshared(places, [True] * 6, "runs/a")) == []
    (told,) = unshared(places, [True, True, False, False, True, False], "runs/a")
    assert told.startswith(
        "the run directory runs/a is not shared: what rank 0 wrote on host n0 cannot be read on n1, n2:"
    )


def test_a_lock_that_two_hosts_have_at_once_is_told_with_the_mount_option() -> None:
    places = job(3, 2)
    assert list(locked_twice(places, [False] * 6, "runs/a")) == []
    (told,) = locked_twice(places, [False, False, True, False, False, True], "runs/a")
    assert told.startswith(
        "a lock in the run directory runs/a counts on its own host only, as n1, n2 showed, so that two"
    )
    assert "--run-dir" in told and "Lustre: flock, not localflock; NFS: local_lock=none" in told


delays = st.floats(0, 100)


@given(st.lists(st.tuples(delays, delays), min_size=1, max_size=4), st.floats(-1e4, 1e4), delays)
def test_clocks_are_never_further_apart_than_they_are(
    waits: list[tuple[float, float]], offset: float, travel: float
) -> None:
    readings = []
    for number, (first, second) in enumerate(waits):
        now = 1000.0 * number
        over = now + max(first, second) + travel
        readings.append([(now + first, over), (now + second + offset, over + offset)])
    told = certain_difference_s(readings, 1, 0)
    assert told == 0 or (told > 0) == (offset > 0)
    assert abs(told) <= abs(offset) + 1e-6
    assert certain_difference_s(readings, 0, 1) == -told
    tightest = min(over - before for (before, over), _ in readings)
    assert abs(told) >= abs(offset) - tightest - max(abs(a - b) for a, b in waits) - 1e-6


def test_a_wrong_clock_is_named_once_a_host() -> None:
    ticks = [(10.0, 10.1)] * 2 + [(6.0, 6.1)] * 2
    (told,) = clock_faults(job(2, 2), [ticks])
    assert told.startswith("the clock of host n1 is 3.9 s or more behind that of n0") and "--exclude=gpu01" in told
    assert list(clock_faults(job(2, 2), [[(10.0, 10.1)] * 2 + [(9.5, 9.6)] * 2])) == []
