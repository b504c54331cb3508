"""A Slurm cluster: the hosts of ``cluster.py`` with their own munged, slurmd and sshd, and slurmctld on the head.

::

    with Slurm(num_nodes=4, tasks_per_node=2, rate="1gbit") as slurm:
        job = slurm.sbatch(["--nodes=2", "slurm/train.sbatch", "configs/quickstart.yaml"])
        assert job.wait(60) == "COMPLETED", job.output

It is Slurm itself, not a likeness: daemons, their messages over the cables, and their time limits. What a job may
not see is undone by namespaces; cores are not confined, so that more tasks than cores run everywhere.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil

from tests.cluster.cluster import CABLE, Cluster, obstacle
from tests.cluster.host import BOOT_SCRIPT, Host, HostError, missing
from tests.cluster.processes import PATIENCE_S
from tests.cluster.slurm_etc import Settings, write_etc
from tests.cluster.slurm_job import Job
from tests.parallel.launch import environment

DAEMONS_SCRIPT = Path(__file__).with_name("daemons.sh")
UP_TIMEOUT_S = 90.0
_POLL_S = 0.2
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "ssh-keygen")
_DAEMONS = {"munged", "sshd", "slurmd", "slurmstepd", "slurmctld", "slurmscriptd", "slurmdbd", "mariadbd", CABLE}
#: without it PMIx prints a page about a plugin that Slurm's side offers and the wheel lacks
_PMIX = {"PMIX_MCA_psec": "native"}


class Slurm:
    """``num_nodes`` nodes for ``tasks_per_node`` tasks each, idle when this returns; sbatch is called on the head.

    ``rate`` and ``latency_us`` are those of the cables, ``gpus`` how many a node claims to have, ``accounting`` makes
    sacct work (two seconds more). ``env`` is the environment of all commands and daemons. Raises HostError with the
    daemons' words when they do not come up.
    """

    def __init__(
        self,
        num_nodes: int = 4,
        tasks_per_node: int = 2,
        rate: str | None = None,
        gpus: int = 0,
        *,
        latency_us: int = 0,
        accounting: bool = False,
    ) -> None:
        self._settings = Settings(num_nodes, tasks_per_node, gpus, accounting)
        self.env = environment(_PMIX)
        ssh_env = {name: value for name, value in self.env.items() if name.startswith(("OMPI_", "PMIX_", "PRTE_"))}
        # sshd and slurmd change users and groups.
        self.cluster = Cluster(
            num_nodes,
            rate,
            lambda shared: write_etc(shared, self._settings, ssh_env),
            latency_us=latency_us,
            all_ids=True,
        )
        self.env["PATH"] = f"{_put_hpctrain(self.shared / 'bin')}:{self.env['PATH']}"
        try:
            self._start({self.cluster.head: "head-with-accounting" if accounting else "head"})
            self._start(dict.fromkeys(self.cluster.hosts, "node"))
            self.await_nodes("idle", self.names, UP_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.cluster.hosts]

    @property
    def shared(self) -> Path:
        return self.cluster.shared

    def close(self) -> None:
        self.cluster.close()

    def __enter__(self) -> Slurm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What a user types on the head.

    def call(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout_s: float = PATIENCE_S,
        *,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on the head with ``env`` added to the environment; HostError where it fails and ``check``."""
        return self.cluster.head.run(argv, timeout_s, {**self.env, **(env or {})}, check=check)

    def sbatch(self, args: Sequence[str], env: Mapping[str, str] | None = None) -> Job:
        """Submit; the output of the job and of its requeued self goes to one file in ``shared``, unless told."""
        output = ["--output", str(self.shared / "job-%j.out"), "--open-mode=append"]
        printed = self.call(["sbatch", "--parsable", *output, *args], env).stdout
        return self.job(printed.split(";")[0].strip())

    def job(self, job_id: str) -> Job:
        """A job that something else has submitted."""
        return Job(job_id, self.call)

    def srun(self, args: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = PATIENCE_S) -> str:
        return self.call(["srun", *args], env, timeout_s).stdout

    def squeue(self) -> list[str]:
        """A line a job: its id, state, nodes and the reason why it waits."""
        return self.call(["squeue", "--noheader", "--format=%i %T %N %r"]).stdout.splitlines()

    def scontrol(self, args: Sequence[str]) -> str:
        return self.call(["scontrol", *args]).stdout

    # What happens to the machines.

    def node_states(self) -> dict[str, str]:
        """As Slurm believes: idle, allocated, mixed, drained, down … with its mark ``*`` for one that is silent."""
        lines = self.call(["sinfo", "--noheader", "--Node", "--format=%N %T"]).stdout.splitlines()
        return dict(line.split() for line in lines)

    def await_nodes(self, state: str, names: Iterable[str], timeout_s: float = PATIENCE_S) -> None:
        """Wait until Slurm says ``state`` of all ``names``; HostError with what it says instead at the limit."""
        wanted = dict.fromkeys(names, state)
        deadline = time.monotonic() + timeout_s
        while not wanted.items() <= (states := self.node_states()).items():
            if time.monotonic() > deadline:
                raise HostError(f"nodes are {states} after {timeout_s:.0f} s, not {wanted}; {self._logs()}")
            time.sleep(_POLL_S)

    def kill_node(self, name: str) -> None:
        """Power off. No connection is closed: its peers hear nothing more of it."""
        self.cluster.cut(name)
        self.cluster.kill(name)

    def boot_node(self, name: str) -> None:
        """Power on; the node is Slurm's again some seconds later."""
        self.cluster.boot(name)
        self._start({self.cluster.host(name): "node"})

    def signal_daemon(self, name: str, daemon: str, signal: str) -> None:
        """Send ``signal`` (as kill(1) names it) to slurmctld (on ``head``), slurmd or munged of a host."""
        pid_file = f"/run/munge/{daemon}.pid" if daemon == "munged" else f"/run/slurm/{daemon}.pid"
        self.cluster.host(name).run(["bash", "-c", f"kill -{signal} $(< {pid_file})"])

    def rejoin(self, name: str) -> None:
        """Mend a node's cable, and bring the node back as an administrator does.

        Slurm asks a node that is down only now and then whether it is back.
        """
        self.cluster.mend(name)
        self.signal_daemon(name, "slurmd", "KILL")
        self.start_slurmd(name)

    def stop_controller(self) -> None:
        """End slurmctld as an administrator does: it saves its state first."""
        wait = "pid=$(< /run/slurm/slurmctld.pid); kill $pid; while [[ -e /proc/$pid ]]; do sleep 0.05; done"
        self.cluster.head.run(["bash", "-c", wait])

    def start_controller(self) -> None:
        self.cluster.head.run(["slurmctld"], env=self.env)

    def start_slurmd(self, name: str) -> None:
        self.cluster.host(name).run(["slurmd"], env=self.env)

    def strangers(self, patience_s: float = PATIENCE_S) -> dict[str, list[str]]:
        """Command lines of what runs on each host beside its daemons, after up to ``patience_s`` for it to end."""
        deadline = time.monotonic() + patience_s
        while (found := {host.name: lines for host in self._all() if (lines := _strangers(host))}) and (
            time.monotonic() < deadline
        ):
            time.sleep(_POLL_S)
        return found

    def restore(self) -> None:
        """Undo whatever a test has done to the machines, cancel all jobs, and wait until all nodes are idle."""
        for name in [host.name for host in self.cluster.hosts if not host.alive]:
            self.boot_node(name)
        for host in self.cluster.hosts:
            self.cluster.mend(host.name)
            if not _running(host, "slurmd"):
                self.start_slurmd(host.name)
        if not _running(self.cluster.head, "slurmctld"):
            self.start_controller()
        self.call(["scancel", "--full", "--user=root"])
        for name, state in self.node_states().items():
            if state.startswith("drain"):
                self.call(["scontrol", "update", f"nodename={name}", "state=resume"])
            elif state.startswith("down"):
                self.rejoin(name)
        self.await_nodes("idle", self.names)

    def _all(self) -> list[Host]:
        return [self.cluster.head, *self.cluster.hosts]

    def _start(self, roles: Mapping[Host, str]) -> None:
        """The daemons of several hosts at once."""
        log = str(self.shared / "log")
        started = {
            host: host.start(
                ["bash", str(DAEMONS_SCRIPT), role, log],
                self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for host, role in roles.items()
        }
        for host, process in started.items():
            _, complaint = process.communicate(timeout=UP_TIMEOUT_S)
            if process.returncode:
                raise HostError(f"{host.name}: daemons do not start: {complaint.strip()}; {self._logs()}")

    def _logs(self) -> str:
        """The last words of each daemon, for an error's text."""
        tails = [f"{path.name}: {path.read_text().strip()[-500:]}" for path in sorted((self.shared / "log").iterdir())]
        return "\n".join(tails)


def _put_hpctrain(folder: Path) -> Path:
    """`hpctrain` as the hosts have it on PATH: this checkout's, whatever is installed. Returns ``folder``."""
    folder.mkdir()
    program = folder / "hpctrain"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hpctrain "$@"\n')
    program.chmod(0o755)
    return folder


def _running(host: Host, daemon: str) -> bool:
    return any(process.name() == daemon for process in host.processes())


def _strangers(host: Host) -> list[str]:
    found = []
    for process in host.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            # sshd has a process of its name for each session.
            session = process.name() == "sshd" and process.ppid() != host.pid
            if session or (process.name() not in _DAEMONS and str(BOOT_SCRIPT) not in words):
                found.append(" ".join(words))
    return found


@cache
def slurm_obstacle() -> str | None:
    """Why no Slurm cluster can be had on this machine, or None: tried out once, with one node."""
    if names := missing(_PROGRAMS):
        return f"{names} not found: run tests/cluster/install.sh"
    if reason := obstacle():
        return reason
    try:
        Slurm(1).close()
    except HostError as error:
        return str(error)
    return None
