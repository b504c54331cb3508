"""Joining a job: the device of a rank, its share of the cores, and a good or bad end."""

from __future__ import annotations

import os

import pytest
import torch

from hpctrain.config.comm import CommConfig
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import Topology
from hpctrain.train.session import choose_device, open_session


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[torch.device]:
    """Pretend that torch, built for them, sees ``count`` GPUs; returns the list of devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("requested", "count", "local_rank", "expected"),
    [
        ("cpu", 4, 1, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 4, 2, "cuda:2"),
        ("cuda", 4, 3, "cuda:3"),
        # a launcher that shows each rank its own GPU alone
        ("cuda", 1, 3, "cuda:0"),
    ],
)
def test_the_device_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, requested: str, count: int, local_rank: int, expected: str
) -> None:
    current = gpus(monkeypatch, count)
    device = choose_device(requested, Topology(local_rank=local_rank))
    assert str(device) == expected
    assert current == ([] if expected == "cpu" else [device])


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_host_whose_gpus_do_not_work_is_named(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    gpus(monkeypatch, 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    message = (
        r"host n7 has 4 GPUs in this job, but torch sees none: if others see theirs, leave it out with "
        r"--exclude=gpu07, else see `hpctrain doctor`, or set train\.device=cpu"
    )
    with pytest.raises(MachineError, match=message):
        choose_device(requested, Topology(host="n7"))
    assert choose_device("cpu", Topology(host="n7")).type == "cpu"


def test_a_torch_without_cuda_trains_on_cpus_beside_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all hosts alike; the preflight has a word on it."""
    gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert choose_device("auto", Topology()).type == "cpu"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch sees no GPU: set train\.device=cpu, or see"):
        choose_device("cuda", Topology())


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    message = r"local rank 2 has no GPU of its own, host n7 shows 2: start at most 2 ranks a host"
    with pytest.raises(UserError, match=message):
        choose_device("auto", Topology(local_rank=2, host="n7"))


def test_a_session_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(CommConfig(), "cpu") as session:
        assert (session.comm.name, session.comm.world_size) == ("serial", 1)
        assert session.cores == len(os.sched_getaffinity(0))
        assert session.engine_reason == "auto without a launcher"


@pytest.mark.parametrize("told", [None, "1"])
def test_threads_of_torch_follow_the_cores_unless_the_user_set_them(
    monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    with open_session(CommConfig(), "cpu") as session:
        assert asked == ([] if told else [session.cores])


@pytest.mark.parametrize("error", [UserError("a mistake"), ValueError("a fault")])
def test_what_goes_wrong_on_one_rank_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)), open_session(CommConfig(), "cpu"):
        raise error


def test_an_interrupt_ends_one_rank_as_it_ends_many() -> None:
    with pytest.raises(SystemExit) as leave, open_session(CommConfig(), "cpu"):
        raise KeyboardInterrupt
    assert leave.value.code == 130
