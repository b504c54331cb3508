"""Engines by name: what auto picks and says, and how unknown and unavailable differ."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from hpctrain.comm import registry
from hpctrain.comm.registry import ENGINES, choose, create
from hpctrain.errors import UserError
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GOOD = {
    "horovod": Probe("horovod", ok=True, built_with=("MPI", "gloo")),
    "mpi": Probe("mpi", ok=True, built_with=("MPI",)),
    "torch": Probe("torch", ok=True, built_with=("gloo", "NCCL")),
    "serial": Probe("serial", ok=True),
}
NO_HOROVOD = Probe("horovod", ok=False, reason="horovod is not installed", remedy="type `make horovod`")
NO_MPI = Probe("mpi", ok=False, reason="mpi4py is not installed", remedy="install it")


def answers(monkeypatch: pytest.MonkeyPatch, *changed: Probe) -> None:
    found = GOOD | {answer.name: answer for answer in changed}
    monkeypatch.setattr(registry, "probe", found.__getitem__)


@pytest.mark.parametrize(
    ("launcher", "changed", "device", "name", "reason"),
    [
        ("none", (), CPU, "serial", "auto without a launcher"),
        ("torchrun", (), CPU, "torch", "auto under torchrun"),
        ("horovodrun", (), CPU, "horovod", "auto under horovodrun"),
        ("mpirun", (), CPU, "horovod", "auto under mpirun"),
        ("srun", (), CPU, "horovod", "auto under srun"),
        ("mpirun", (NO_HOROVOD,), CPU, "mpi", "auto under mpirun; not horovod: horovod is not installed"),
        ("mpirun", (NO_HOROVOD, NO_MPI), CPU, "torch",
         "auto under mpirun; not horovod: horovod is not installed; not mpi: mpi4py is not installed"),
        ("mpirun", (), GPU, "torch",
         "auto under mpirun; not horovod: built without NCCL; not mpi: built without NCCL"),
        ("mpirun", (Probe("mpi", ok=True, built_with=("MPI", "NCCL")),), GPU, "mpi",
         "auto under mpirun; not horovod: built without NCCL"),
        ("none", (), GPU, "serial", "auto without a launcher"),
        ("mpirun", (Probe("horovod", ok=True, built_with=("gloo",)),), CPU, "mpi",
         "auto under mpirun; not horovod: built without MPI"),
        ("srun", (Probe("horovod", ok=True, built_with=("gloo",)),), CPU, "horovod", "auto under srun"),
        ("horovodrun", (Probe("horovod", ok=True, built_with=("MPI",)),), CPU, "torch",
         "auto under horovodrun; not horovod: built without gloo"),
    ],
)  # fmt: skip
def test_auto_says_what_it_picked_and_why(
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    changed: tuple[Probe, ...],
    device: torch.device,
    name: str,
    reason: str,
) -> None:
    answers(monkeypatch, *changed)
    assert choose("auto", Topology(launcher=launcher, world_size=2), device) == (name, reason)


def test_a_requested_engine_is_taken_as_it_is() -> None:
    assert choose("mpi", Topology()) == ("mpi", "asked for by comm.engine")


def test_no_engine_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, Probe("torch", ok=False, reason="torch was built without distributed"))
    text = "no engine is fit under torchrun; not torch: torch was built without distributed: see `hpctrain doctor`"
    with pytest.raises(UserError, match=re.escape(text)):
        choose("auto", Topology(launcher="torchrun", world_size=2))


def test_an_unknown_engine_lists_those_there_are() -> None:
    text = "there is no engine 'nccl': set comm.engine to auto or one of horovod, mpi, torch, serial"
    for ask in (lambda: choose("nccl", Topology()), lambda: registry.probe("nccl")):
        with pytest.raises(UserError, match=re.escape(text)):
            ask()


def test_an_unavailable_engine_tells_why_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, NO_HOROVOD)
    text = (
        "the horovod engine does not work here (horovod is not installed): type `make horovod`; "
        "available: mpi, torch, serial"
    )
    with pytest.raises(UserError, match=re.escape(text)):
        create("horovod", Topology(), CPU, timeout_s=1)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_answers_without_joining_a_job(name: str) -> None:
    answer = registry.probe(name)
    assert answer.name == name
    assert answer.versions if answer.ok else answer.reason and answer.remedy


@pytest.mark.parametrize(("name", "module"), [("horovod", "horovod"), ("mpi", "mpi4py")])
def test_a_missing_library_is_an_answer(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [_Absent(module), *sys.meta_path])
    answer = registry.probe(name)
    assert not answer.ok
    assert f"{module} is not installed" in answer.reason
    assert answer.remedy


class _Absent:
    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == self._module:
            raise ModuleNotFoundError(f"No module named {self._module!r}", name=self._module)


def test_serial_refuses_a_launcher_of_several_ranks() -> None:
    topology = Topology(rank=1, world_size=2, launcher="mpirun")
    text = "mpirun says rank 1 of 2 but the serial engine came up as rank 0 of 1: start it with plain python"
    with pytest.raises(UserError, match=text):
        create("serial", topology, CPU, timeout_s=1)


def test_horovod_without_nccl_is_refused_on_a_gpu() -> None:
    hvd = pytest.importorskip("horovod.torch")
    if hvd.nccl_built():
        pytest.skip("this Horovod has NCCL")
    with pytest.raises(UserError, match="Horovod was built without NCCL and would copy GPU buffers through the host"):
        create("horovod", Topology(), GPU, timeout_s=1)


def test_an_mpi_for_the_main_thread_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpctrain.comm import mpi_engine

    fake = SimpleNamespace(Is_initialized=lambda: True, Query_thread=lambda: 1, THREAD_SERIALIZED=2)
    monkeypatch.setattr(mpi_engine, "_import_mpi", lambda: fake)
    with pytest.raises(UserError, match="this MPI may be called by its main thread only: use one with thread support"):
        mpi_engine.boot(Topology(), CPU, timeout_s=1)
