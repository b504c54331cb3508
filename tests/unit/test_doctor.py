"""What the doctor concludes from what it found, and that no library can take it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from hpctrain.doctor import machine as doctor
from hpctrain.doctor.machine import Choice, Report
from hpctrain.doctor.outcome import tell
from hpctrain.metrics.jsonfiles import to_text
from hpctrain.topology.gpus import Gpus
from hpctrain.topology.probe import Probe

MAPS = """\
7f00-7f01 r-xp 00000000 fe:00 11 /env/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2
7f01-7f02 r--p 00001000 fe:00 11 /env/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2
7f02-7f03 r-xp 00000000 fe:00 12 /env/lib/libmpi.so.40.40.7
7f03-7f04 r-xp 00000000 fe:00 13 /env/lib/libmpi_cxx.so.40
7f04-7f05 r-xp 00000000 fe:00 14 /usr/lib/libnccl-net.so
7f05-7f06 rw-p 00000000 00:00 0  [heap]
"""
SERIAL = Probe("serial", ok=True, versions={"torch": "2.13.0"})
HOROVOD = Probe("horovod", ok=True, versions={"horovod": "0.28.1"}, built_with=("MPI", "gloo"))
DALI = Probe("dali", ok=False, reason="nvidia.dali is not installed", remedy="pip install nvidia-dali-cuda130")


def report(*problems: str) -> Report:
    return Report(
        machine={"host": "login1", "cores": "2 usable of 64"},
        gpus=("NVIDIA H200, 141 GiB",),
        launchers={"mpirun": "/env/bin/mpirun"},
        engines=(SERIAL, HOROVOD),
        loaders=(DALI,),
        mapped=doctor.mapped_libraries(MAPS),
        auto=(Choice("mpirun", "horovod", "auto under mpirun"), Choice("data.loader", "torch", "no DALI")),
        problems=problems,
    )


def test_mapped_libraries_are_told_apart() -> None:
    mapped = doctor.mapped_libraries(MAPS)
    assert mapped == {
        "nccl": ["/env/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2"],
        "cudart": [],
        "mpi": ["/env/lib/libmpi.so.40.40.7"],
    }
    assert doctor.mapping_problems(mapped) == []


def test_two_nccl_in_one_process_are_a_problem() -> None:
    twice = MAPS + "7f06-7f07 r-xp 00000000 fe:00 15 /env/lib/cupy.libs/libnccl-1a2b3c4d.so.2.28.9\n"
    (problem,) = doctor.mapping_problems(doctor.mapped_libraries(twice))
    assert problem.startswith("a run would load 2 copies of libnccl (/env/lib/cupy.libs/libnccl-1a2b3c4d.so.2.28.9, ")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["nvidia-nccl-cu13", "nvidia-dali-cuda130", "cupy-cuda13x", "torch"], None),
        (["nvidia-nccl-cu12", "nvidia-nccl-cu13"], "NCCL is installed 2 times (nvidia-nccl-cu12, nvidia-nccl-cu13): "),
        (["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "DALI is installed 2 times"),
        (["cupy", "cupy-cuda13x"], "CuPy is installed 2 times"),
        (["nvidia-dali"], "nvidia-dali is a placeholder: uninstall it and install nvidia-dali-cuda130"),
    ],
)
def test_distributions_that_get_in_each_others_way(names: list[str], expected: str | None) -> None:
    problems = doctor.distribution_problems(names)
    assert len(problems) == (expected is not None)
    assert all(problem.startswith(expected or "") for problem in problems)


@pytest.mark.parametrize(("driver", "fits"), [(13, True), (14, True), (12, False)])
def test_dali_must_not_be_newer_than_the_driver(driver: int, fits: bool) -> None:
    problems = doctor.dali_problems(driver, ["nvidia-dali-cuda130", "torch"])
    assert problems == [] if fits else "install nvidia-dali-cuda120" in problems[0]


def test_gpus_are_told_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(("H200",) * 2, (150 << 30,) * 2, driver="570.1", cuda=(12, 8))
    monkeypatch.setattr(doctor, "read_gpus", lambda: gpus)
    lines, (problem,) = doctor._gpus(["nvidia-dali-cuda130"])
    assert lines == ("H200, 150 GiB, driver 570.1, CUDA up to 12.8",) * 2
    assert "install nvidia-dali-cuda120" in problem

    def no_driver() -> Gpus:
        raise LookupError("NVML: Driver Not Loaded")

    monkeypatch.setattr(doctor, "read_gpus", no_driver)
    assert doctor._gpus(["nvidia-dali-cuda130"]) == ((), [])


def test_auto_must_find_an_engine_everywhere() -> None:
    nothing = Choice("mpirun", "", "no engine is fit under mpirun: see `hpctrain doctor`")
    assert doctor.auto_problems([nothing], [SERIAL], on_gpu=False) == [nothing.why]


def test_auto_without_nccl_is_a_problem_on_gpus_only() -> None:
    choice = Choice("mpirun", "horovod", "auto under mpirun")
    assert doctor.auto_problems([choice], [SERIAL, HOROVOD], on_gpu=False) == []
    (problem,) = doctor.auto_problems([choice], [SERIAL, HOROVOD], on_gpu=True)
    assert "under mpirun, auto takes horovod without NCCL" in problem
    assert "make horovod GPU=1" in problem
    alone = Choice("plain python", "serial", "auto without a launcher")
    assert doctor.auto_problems([alone], [SERIAL, HOROVOD], on_gpu=True) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", "the process that loaded it was ended by SIGSEGV"),
        ("echo 'undefined symbol: x' >&2; exit 1", "undefined symbol: x"),
        ("exit 7", "exit status 7"),
        ("sleep 20", "no answer within 1 s"),
    ],
)
def test_a_library_that_takes_its_process_down_is_an_answer(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr(doctor, "CHILD_TIMEOUT_S", 1.0)
    answer = doctor.ask("engine:horovod", "horovod")
    assert not answer.ok
    assert answer.reason == reason
    assert answer.remedy == "reinstall horovod, for the torch that is installed here"


def test_a_child_answers_past_what_libraries_print() -> None:
    assert doctor.ask("engine:serial", "serial").ok
    assert doctor.ask("loader:synthetic", "synthetic").ok


def test_json_holds_everything_and_the_verdict() -> None:
    record = json.loads(to_text(doctor.to_record(report("one thing"))))
    assert record["ok"] is False
    assert TypeAdapter(Probe).validate_python(record["engines"][1]) == HOROVOD
    assert record["auto"][0] == {"situation": "mpirun", "picked": "horovod", "why": "auto under mpirun"}
    assert doctor.to_record(report())["ok"] is True


def test_findings_go_to_people_or_to_a_file_or_as_json_to_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(json_file: Path | None) -> str:
        tell({"ok": True}, lambda: print("a table"), json_file)
        return capsys.readouterr().out

    assert shown(None) == "a table\n"
    assert shown(Path("-")) == '{\n  "ok": true\n}\n'
    assert shown(tmp_path / "found.json") == "a table\n"
    assert (tmp_path / "found.json").read_text() == '{\n  "ok": true\n}\n'


def test_tables_name_reasons_remedies_and_problems(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.render(report("libnccl [twice] is loaded"))
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "problem: libnccl [twice] is loaded" in words
    assert "auto does not work here as it should" in words
    assert "login1" in words
    doctor.render(report())
    assert "auto works here" in capsys.readouterr().out
    assert (report().exit_code, report("one").exit_code) == (0, 1)
