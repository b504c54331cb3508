"""One host: namespaces held by one process, its pid 1. It knows nothing of cables; ``cluster.py`` lays those.

When pid 1 ends, the kernel kills every process of the host, and its network and mounts go with the last of them.
Nothing has a name outside, so there is nothing to remove. Pid 1 ends when its host is killed, and also when the
process that made it dies in whatever way, because that closes a pipe.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

BOOT_SCRIPT = Path(__file__).with_name("boot.sh")
#: to come up, and to end with all that runs there
BOOT_TIMEOUT_S = 60.0
#: the repository and the environment of this Python, which hosts see also where they lie in a folder of their own
_ROOT = Path(__file__).resolve().parents[2]
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
#: ip and tc are not on every user's PATH
_SYSTEM_FOLDERS = "/usr/sbin:/sbin"


class HostError(Exception):
    """The machine does not let a host come up, or a command that must succeed on one has failed."""


class Traffic(NamedTuple):
    """Bytes through a host's network card since it came up, headers included."""

    sent: int
    received: int

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.received - before.received)


class Host:
    """Made by ``boot``. ``pid`` is that of its pid 1 on this machine."""

    def __init__(self, name: str, address: str, holder: subprocess.Popen[str], pid: int) -> None:
        self.name, self.address, self.pid = name, address, pid
        self._holder = holder

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` so that it runs on this host, in the current folder, and dies with the process started."""
        enter = [*_nsenter(self.pid), *_NAMESPACES]
        return [*enter, "setpriv", "--pdeathsig=KILL", "env", f"--chdir={os.getcwd()}", *argv]

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start ``argv`` on the host; ``env`` is the whole environment, ``options`` are Popen's."""
        return subprocess.Popen(self.command(argv), env=with_system_path(env), start_new_session=True, **options)

    def run(
        self, argv: Sequence[str], timeout_s: float = 30.0, env: Mapping[str, str] | None = None, *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on the host and collect stdout and stderr.

        Raises HostError with its output when it fails and ``check`` is set, TimeoutExpired at the limit.
        """
        done = subprocess.run(
            self.command(argv),
            env=with_system_path(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise HostError(f"{self.name}: {' '.join(argv)} left with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def traffic(self, card: str = "eth0") -> Traffic:
        """What has passed ``card`` so far, as the kernel counts it."""
        paths = [f"/sys/class/net/{card}/statistics/{way}_bytes" for way in ("tx", "rx")]
        sent, received = self.run(["cat", *paths]).stdout.split()
        return Traffic(int(sent), int(received))

    def processes(self) -> list[psutil.Process]:
        """All that run on this host but its pid 1; the dead that nobody waited for are none."""
        if not self.alive:
            return []
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                here = process.pid != self.pid and os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    @property
    def alive(self) -> bool:
        return self._holder.poll() is None

    def kill(self) -> None:
        """End all processes of the host at once, as pulling its plug would; returns when they are gone."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        """Wait for a host that is about to end."""
        self._holder.wait(BOOT_TIMEOUT_S)
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            if pipe:
                pipe.close()


def boot(name: str, address: str, shared: Path, head: Host | None, user_namespace: Sequence[str] = ()) -> Host:
    """A new host without cables. Its processes are visible on ``head``, if given, and end with it.

    A head's ``user_namespace`` are the options of unshare(1) that make one; the hosts share it. Empty for root.
    Raises HostError with the machine's own words when a namespace or a mount is refused.
    """
    outer = [*_nsenter(head.pid), "--pid", "unshare"] if head else ["unshare", *user_namespace]
    script = ["bash", str(BOOT_SCRIPT), name, str(shared), str(_ROOT), sys.prefix]
    holder = subprocess.Popen(
        [*outer, *_NAMESPACES, "--fork", "--kill-child", *script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=with_system_path(None),
        start_new_session=True,
    )
    assert holder.stdout is not None
    pid = holder.stdout.readline().strip()
    if not pid:
        _, complaint = holder.communicate(timeout=BOOT_TIMEOUT_S)
        raise HostError(f"host {name} does not come up: {complaint.strip()}")
    return Host(name, address, holder, int(pid))


def with_system_path(env: Mapping[str, str] | None) -> dict[str, str]:
    """``env``, by default this process's, whose PATH leads to ip, tc and daemons as well."""
    env = os.environ if env is None else env
    return {**env, "PATH": f"{env.get('PATH', '/usr/bin:/bin')}:{_SYSTEM_FOLDERS}"}


def missing(programs: Iterable[str]) -> str:
    """Those of ``programs`` that hosts would not find, in words; empty when all are there."""
    path = with_system_path(None)["PATH"]
    return ", ".join(name for name in programs if not shutil.which(name, path=path))


def _nsenter(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", *([] if os.geteuid() == 0 else ["--user", "--preserve-credentials"])]
