"""The hosts: separate, joined by cables that carry what they are told to, and gone without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import CABLE, ON, Cluster, compile_cable, leftovers
from tests.cluster.flows import payload_rate, round_trip_s
from tests.cluster.host import BOOT_SCRIPT, HostError
from tests.cluster.processes import PATIENCE_S, ROOT, end_owner, running, until

REACH = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])).close()"
LISTEN = "import socket\ns = socket.create_server(('', 7000))\nprint('ready', flush=True)\nwhile True: s.accept()"

pytestmark = pytest.mark.timeout(5 * PATIENCE_S)


def test_hosts_are_separate(cluster: Cluster) -> None:
    first, second = cluster.hosts[:2]
    assert [host.run(["hostname"]).stdout.strip() for host in cluster.hosts] == ["n1", "n2", "n3", "n4"]
    for folder in ("/tmp", "/run", "/dev/shm"):
        first.run(["touch", f"{folder}/mine"])
        assert second.run(["test", "-e", f"{folder}/mine"], check=False).returncode == 1
        assert not Path(folder, "mine").exists()
    first.run(["touch", str(cluster.shared / "ours")])
    second.run(["test", "-e", str(cluster.shared / "ours")])
    namespaces = [
        os.readlink(f"/proc/{host.pid}/ns/{kind}") for host in cluster.hosts for kind in ("net", "pid", "ipc")
    ]
    assert len(set(namespaces)) == 12


def test_commands(cluster: Cluster) -> None:
    host = cluster.hosts[2]
    done = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
    assert host.run(["sh", "-c", "pwd; echo $WORD"], env={"WORD": "a b"}).stdout == f"{Path.cwd()}\na b\n"
    with pytest.raises(HostError, match="n3: false left with 1"):
        host.run(["false"])
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "5005"], timeout_s=3)
    assert until(lambda: not running("sleep", "5005"))


def test_the_head_reaches_a_host_as_by_ssh(cluster: Cluster) -> None:
    done = cluster.head.run([str(ON), "n4", "hostname;", "echo 'a  b'; exit 7"], check=False)
    assert (done.stdout, done.returncode) == ("n4\na  b\n", 7)
    assert cluster.head.run([str(ON), "n9", "true"], check=False).returncode == 255


def test_a_cable_carries_its_rate_and_counts(cluster: Cluster) -> None:
    num_bytes = 16 << 20
    sender, receiver = cluster.hosts[0], cluster.hosts[1]
    before = sender.traffic(), receiver.traffic(), cluster.hosts[2].traffic()
    rate = payload_rate(sender, receiver, num_bytes)
    sent, received, bystander = (host.traffic().since(old) for host, old in zip(cluster.hosts[:3], before, strict=True))
    # A busy machine may be slower than its cable.
    assert rate < 1.0e9 / 8
    assert num_bytes < sent.sent < 1.02 * num_bytes
    assert num_bytes < received.received < 1.02 * num_bytes
    assert max(bystander) < 0.01 * num_bytes


def test_a_cut_cable_carries_nothing_until_mended(cluster: Cluster) -> None:
    cut_and_mend(cluster, "n4")


def cut_and_mend(cluster: Cluster, name: str) -> None:
    server = cluster.host(name).start([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()

    def reaches(limit_s: float) -> bool:
        reach = [sys.executable, "-c", REACH, name, str(limit_s)]
        return cluster.hosts[0].run(reach, check=False).returncode == 0

    try:
        assert reaches(5)
        cluster.cut(name)
        assert not reaches(0.3)
        cluster.mend(name)
        assert reaches(10)
    finally:
        server.kill()
        server.communicate()


def test_a_cable_has_its_latency_beside_its_rate() -> None:
    latency_us, num_bytes = 4000, 8 << 20
    with Cluster(2, rate="100mbit", latency_us=latency_us) as cluster:
        first, second = cluster.hosts
        # Two cables, there and back.
        least_s = 4 * latency_us / 1e6
        assert least_s <= round_trip_s(first, second) < 1.5 * least_s + 1e-3
        assert payload_rate(first, second, num_bytes) < 100e6 / 8
        before = second.traffic()
        cut_and_mend(cluster, "n2")
        assert second.traffic().since(before).received > 0
        cluster.kill("n2")
        cluster.boot("n2")
        second = cluster.host("n2")
        assert least_s <= round_trip_s(first, second) < 1.5 * least_s + 1e-3
        program = str(cluster.shared / CABLE)
        assert len(running(program)) == 2
    assert not running(program)


def test_a_killed_host_is_empty_and_comes_back() -> None:
    with Cluster(2) as cluster:
        cluster.hosts[0].start(["setsid", "sleep", "5001"])
        cluster.hosts[1].start(["setsid", "sleep", "5002"])
        assert until(lambda: bool(running("sleep", "5001") and running("sleep", "5002")))
        cluster.kill("n1")
        assert not running("sleep", "5001")
        assert running("sleep", "5002")
        cluster.boot("n1")
        assert cluster.hosts[0].run(["hostname"]).stdout == "n1\n"
        assert cluster.head.run([str(ON), "n1", "hostname"]).stdout == "n1\n"
        with pytest.raises(ValueError, match="there is no host 'n3': the hosts are n1, n2"):
            cluster.cut("n3")
        shared = cluster.shared
    assert not running("sleep", "5002")
    assert not running(str(BOOT_SCRIPT), str(shared))
    assert not shared.exists()


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize(("ending", "latency_us"), [(signal.SIGKILL, 0), (signal.SIGTERM, 0), (signal.SIGKILL, 100)])
def test_nothing_outlives_a_killed_owner(ending: signal.Signals, latency_us: int) -> None:
    program = (
        f"from tests.cluster.cluster import Cluster; import time; c = Cluster(2, '1gbit', latency_us={latency_us}); "
        "c.hosts[0].start(['setsid', 'sleep', '5003']); print(c.shared, flush=True); time.sleep(600)"
    )
    shared = end_owner(program, ending, lambda: bool(running("sleep", "5003")))
    assert until(lambda: not running("sleep", "5003") and not running(str(BOOT_SCRIPT), shared))
    assert until(lambda: not running(f"{shared}/{CABLE}"))
    assert Path(shared) in leftovers()
    done = subprocess.run([sys.executable, "-m", "tests.cluster", "down"], cwd=ROOT, capture_output=True, text=True)
    assert f"removed {shared}\n" in done.stdout
    assert not Path(shared).exists()


def test_a_refusal_says_why() -> None:
    with pytest.raises(ValueError, match="a cluster has 1 to 253 hosts, not 0"):
        Cluster(0)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(HostError, match="head: tc .*left with"):
        Cluster(1, rate="fast")
    with pytest.raises(ValueError, match="the latency of a cable is 0 or more, not -1 us"):
        Cluster(1, latency_us=-1)
    assert set(psutil.Process().children(recursive=True)) == before


def test_a_latency_needs_a_compiler_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"^cc not found, which a cable with a latency needs: run .*install.sh$"):
        compile_cable(tmp_path / CABLE)
    (tmp_path / "cc").write_text("#!/bin/sh\necho no headers >&2; exit 1\n")
    (tmp_path / "cc").chmod(0o755)
    with pytest.raises(HostError, match="cc does not compile .*cable.c: no headers"):
        compile_cable(tmp_path / CABLE)


def test_the_shell_for_people() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster", "up", "2", "--rate", "1gbit", "--latency-us", "500"],
        cwd=ROOT,
        input="hostname; on n2 hostname; exit 4\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 4
    assert done.stdout.splitlines()[1:] == ["head", "n2"]
