"""Where a run came from: told cheaply, without secrets, and without ever ending the run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import hpctrain
from hpctrain.metrics import provenance
from hpctrain.metrics.provenance import Provenance, command_line, loaded_modules, relevant_environment
from hpctrain.topology.gpus import Gpus
from tests.unit.fake_group import FakeCommunicator, run_group

ROOT = Path(__file__).parents[2]


def test_record_tells_software_machine_and_time() -> None:
    record = Provenance(["node1", "node2"]).to_record()
    json.dumps(record, allow_nan=False)
    assert record["hosts"] == ["node1", "node2"]
    assert record["python"] == "{}.{}.{}".format(*sys.version_info)
    assert record["versions"]["hpctrain"] == hpctrain.__version__
    assert {"torch", "numpy"} <= record["versions"].keys()
    assert 1 <= record["cpu"]["cores_available"] <= record["cpu"]["cores_total"]
    assert datetime.fromisoformat(record["start_utc"]).utcoffset() is not None
    assert record["wall_s"] >= 0
    assert 0 <= record["steal_share"] <= 1


def test_hosts_are_told_in_order_of_nodes_and_on_rank_0() -> None:
    def rank(comm: FakeCommunicator) -> list[str] | None:
        provenance = Provenance.of_job(comm)
        return None if provenance is None else provenance.to_record()["hosts"]

    assert run_group(4, rank, hosts=["n10", "n10", "n2", "n2"]) == [["n10", "n2"], None, None, None]


def test_modules_are_told() -> None:
    assert loaded_modules({}) == []
    assert loaded_modules({"LOADEDMODULES": "gcc/13.2:cuda/13.0:"}) == ["gcc/13.2", "cuda/13.0"]


def test_a_container_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPTAINER_CONTAINER", str(tmp_path / "x.sif"))
    record = Provenance([]).to_record()
    assert record["container"]["image"] == "x.sif"
    assert record["container_sha256"] is None
    assert record["unavailable"]["container_sha256"].startswith(f"LookupError: there is no {tmp_path}/x.sif.sha256 in")


def test_only_steering_variables_are_kept() -> None:
    environment = {
        "NCCL_DEBUG": "INFO", "UCX_TLS": "rc", "OMPI_MCA_btl": "self", "HOROVOD_CYCLE_TIME": "1",
        "OMP_NUM_THREADS": "4", "SLURM_JOB_ID": "77", "SLURM_JWT": "x", "HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x",
        "_HOROVOD_SECRET_KEY": "x", "HOROVOD_SECRET_KEY": "x", "OMPI_MCA_token": "x", "NCCL_password": "x",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_initial_wdir": "/",
    }  # fmt: skip
    kept = ["HOROVOD_CYCLE_TIME", "NCCL_DEBUG", "OMPI_MCA_btl", "OMP_NUM_THREADS", "SLURM_JOB_ID", "UCX_TLS"]
    assert list(relevant_environment(environment)) == kept


def test_failing_probe_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("driver gone")

    for name in ("_versions", "_git_state", "_cpu", "_gpus"):
        monkeypatch.setattr(provenance, name, fail)
    monkeypatch.setattr(provenance.psutil, "cpu_times", fail)
    monkeypatch.setattr(provenance.os, "getloadavg", fail)
    record = Provenance([]).to_record()
    for name in ("versions", "git", "cpu", "gpus", "load_average_start", "load_average_end", "steal_share"):
        assert record[name] is None
        assert record["unavailable"][name] == "RuntimeError: driver gone"


def test_gpus_are_named_with_their_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(names=("GPU 0", "GPU 1"), memory_bytes=(1, 2), driver="580.1", cuda=(13, 0))
    monkeypatch.setattr(provenance, "read_gpus", lambda: gpus)
    assert Provenance([]).to_record()["gpus"] == {"names": ["GPU 0", "GPU 1"], "driver": "580.1"}


def make_checkout(folder: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, timeout=30, capture_output=True)

    (folder / "hpctrain").mkdir()
    (folder / "hpctrain" / "__init__.py").write_text("")
    git("init", "--quiet")
    git("add", "hpctrain")
    git("commit", "--quiet", "-m", "first")
    git("tag", "v1")


def test_checkout_tells_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path)
    monkeypatch.setattr(provenance.hpctrain, "__file__", str(tmp_path / "hpctrain" / "__init__.py"))
    clean = Provenance([]).to_record()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "hpctrain" / "__init__.py").write_text("changed = True\n")
    assert Provenance([]).to_record()["git"] == {"commit": clean["commit"], "dirty": True}


def test_package_installed_inside_another_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkout(tmp_path)
    installed = tmp_path / ".venv" / "site-packages" / "hpctrain" / "__init__.py"
    monkeypatch.setattr(provenance.hpctrain, "__file__", str(installed))
    record = Provenance([]).to_record()
    assert record["git"] is None
    assert "git" not in record["unavailable"]


def test_collecting_is_cheap_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, time; from hpctrain.metrics.provenance import Provenance\n"
        "Provenance([]); started = time.process_time(); Provenance([]).to_record()\n"
        "print(time.process_time() - started); assert not {'torch', 'horovod', 'mpi4py', 'cupy'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, timeout=60, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 0.2


def test_wall_time_and_steal_cover_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times(tuple[float, ...]):
        steal: float

    def times(idle: float, steal: float) -> Times:
        found = Times((idle, steal))
        found.steal = steal
        return found

    readings = iter([times(100.0, 1.0), times(190.0, 11.0)])
    monkeypatch.setattr(provenance.psutil, "cpu_times", lambda: next(readings))
    begun = Provenance([])
    time.sleep(0.02)
    record = begun.to_record()
    assert record["steal_share"] == 0.1
    assert record["wall_s"] >= 0.02


def test_the_command_can_be_typed_again_elsewhere() -> None:
    assert command_line(["/opt/venv/bin/hpctrain", "train", "a b.yaml"]) == "hpctrain train 'a b.yaml'"
    assert command_line(["/srv/hpctrain/__main__.py", "doctor"]) == "python -m hpctrain doctor"
