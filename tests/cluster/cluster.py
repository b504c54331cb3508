"""A switch and hosts around it, joined by one cable each, with the rate and the latency of a network.

::

    with Cluster(4, rate="1gbit", latency_us=100) as cluster:
        cluster.hosts[0].run(["hostname"])
        cluster.cut("n2")

The head carries the switch (a bridge) and sees the processes of all hosts; commands there reach a host by
``on HOST COMMAND``. Hosts are n1, n2, … at 10.77.0.1, 10.77.0.2, …; several clusters do not see each other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType

from tests.cluster.host import Host, HostError, boot, missing
from tests.cluster.unprivileged import user_namespace, why_forbidden

NETWORK = "10.77.0"
HEAD_NUMBER = 254
ON = Path(__file__).with_name("on")
#: joins two network cards with a latency between them
CABLE = "cable"
_PREFIX = "hpctrain-cluster-"
_PROGRAMS = ("ip", "tc", "nsenter", "unshare", "setpriv", "mount")
# A bucket that holds two of the largest segments the kernel hands over at once, and 20 ms of queue behind it.
_QUEUE = "burst 128kb latency 20ms"
# Linux' default, spelt out because machines differ; the sysctl of that name is closed to namespaces.
_CONGESTION_CONTROL = "cubic"


class Cluster:
    """``num_hosts`` hosts and a head; ``rate`` as tc(8) writes it (``1gbit``), None for as fast as the machine can.

    A frame takes ``latency_us`` on each cable, in each direction; between two hosts lie two cables.

    ``shared`` is a folder that all hosts have at the same path, while /tmp, /run and /dev/shm are each host's own
    and the rest of the file system is the machine's. ``prepare`` gets it before any host boots; what it puts into
    ``etc`` there lies over each host's /etc. With ``all_ids`` programs can change users and groups there, which root's
    always can. Raises HostError where the machine refuses.
    """

    def __init__(
        self,
        num_hosts: int,
        rate: str | None = None,
        prepare: Callable[[Path], None] = lambda shared: None,
        *,
        latency_us: int = 0,
        all_ids: bool = False,
    ) -> None:
        if not 1 <= num_hosts < HEAD_NUMBER:
            raise ValueError(f"a cluster has 1 to {HEAD_NUMBER - 1} hosts, not {num_hosts}")
        if latency_us < 0:
            raise ValueError(f"the latency of a cable is 0 or more, not {latency_us} us")
        namespace = user_namespace(all_ids=all_ids)
        self.rate, self.latency_us = rate, latency_us
        self.shared = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._names = [f"n{number}" for number in range(1, num_hosts + 1)]
        self._nodes: dict[str, Host] = {}
        try:
            self._write_names()
            if latency_us:
                compile_cable(self.shared / CABLE)
            prepare(self.shared)
            self.head = boot("head", f"{NETWORK}.{HEAD_NUMBER}", self.shared, None, namespace)
            self._lay_switch()
            for name in self._names:
                self.boot(name)
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> list[Host]:
        """The hosts in order, without the head."""
        return [self._nodes[name] for name in self._names]

    def host(self, name: str) -> Host:
        """One of ``hosts``, or the head."""
        return self.head if name == "head" else self._nodes[self._known(name)]

    def boot(self, name: str) -> None:
        """Start a host that was not there or was killed, and plug its cable in."""
        number = self._names.index(self._known(name)) + 1
        host = boot(name, f"{NETWORK}.{number}", self.shared, self.head)
        self._nodes[name] = host
        pid = _seen_from_head(host)
        if self.latency_us:
            self._head_net(f"{self.shared / CABLE} {name} /proc/{pid}/ns/net eth0 {self.latency_us}")
        else:
            self._head_net(f"ip link add {name} type veth peer name eth0 netns {pid}")
        self._head_net(f"ip link set {name} master eth0 up")
        # A fixed address of the card, so that its peers' tables hold after a reboot.
        host.run(["ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}", "up"])
        _address(host)
        if self.rate is not None:
            self.shape(name, self.rate)
        self.head.run(["sh", "-c", f"echo {pid} > /run/hosts/{name}"])

    def shape(self, name: str, rate: str) -> None:
        """Give the host's cable another rate, until the host is booted again."""
        shape = f"root tbf rate {rate} {_QUEUE}"
        self._head_net(f"tc qdisc replace dev {self._known(name)} {shape}")
        self._nodes[name].run(f"tc qdisc replace dev eth0 {shape}".split())

    def kill(self, name: str) -> None:
        """Power off: all processes of the host end at once and its cable is gone, until ``boot``."""
        self._nodes[self._known(name)].kill()
        # Its network would go by itself, but only when the kernel gets round to it.
        self.head.run(["ip", "link", "delete", name], check=False)

    def cut(self, name: str) -> None:
        """Pull the host's cable; its card still believes in it, as behind a switch that has failed."""
        self._head_net(f"ip link set {self._known(name)} down")

    def mend(self, name: str) -> None:
        """Plug the cable in again. The first packet may wait a second for the other's address."""
        self._head_net(f"ip link set {self._known(name)} up")

    def close(self) -> None:
        """End all processes of all hosts, and remove the shared folder. May be called twice."""
        if hasattr(self, "head"):
            # The hosts' process spaces lie within the head's.
            self.head.kill()
            for host in self._nodes.values():
                host.reap()
        shutil.rmtree(self.shared, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise ValueError(f"there is no host {name!r}: the hosts are {', '.join(self._names)}")
        return name

    def _write_names(self) -> None:
        etc = self.shared / "etc"
        etc.mkdir()
        numbered = [*enumerate(self._names, start=1), (HEAD_NUMBER, "head")]
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{number} {name}" for number, name in numbered)]
        (etc / "hosts").write_text("\n".join(lines) + "\n")

    def _lay_switch(self) -> None:
        self._head_net("ip link add eth0 type bridge")
        self._head_net("ip link set eth0 up")
        _address(self.head)
        self.head.run(["mkdir", "/run/hosts"])

    def _head_net(self, command: str) -> None:
        self.head.run(command.split())


def _address(host: Host) -> None:
    """Give the host's card its address and the way to the others."""
    host.run(["ip", "address", "add", f"{host.address}/24", "dev", "eth0", "noprefixroute"])
    way = f"{NETWORK}.0/24 dev eth0 src {host.address} congctl {_CONGESTION_CONTROL}"
    host.run(["ip", "route", "add", *way.split()])


def _seen_from_head(host: Host) -> int:
    """The host's pid 1 as the head counts: the line lists it for this machine, the head and the host."""
    status = Path(f"/proc/{host.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return int(line.split()[-2])


def compile_cable(program: Path) -> None:
    """Make ``program`` out of ``cable.c``. Raises HostError where there is no compiler, or it complains."""
    if missing(["cc"]):
        raise HostError("cc not found, which a cable with a latency needs: run tests/cluster/install.sh")
    source = Path(__file__).with_name("cable.c")
    done = subprocess.run(["cc", "-O2", "-o", str(program), str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"cc does not compile {source}: {done.stderr.strip()}")


def leftovers() -> list[Path]:
    """Shared folders of this user's clusters whose process was killed: all that can remain of one."""
    folders = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*")
    mine = [folder for folder in folders if os.access(folder, os.W_OK)]
    return [folder for folder in mine if not Path("/proc", folder.name.split("-")[2]).exists()]


@cache
def obstacle() -> str | None:
    """Why no cluster can be had on this machine, or None: tried out once, with one host."""
    if names := missing(_PROGRAMS):
        return f"{names} not found: run tests/cluster/install.sh"
    try:
        Cluster(1, rate="1gbit").close()
    except HostError as error:
        # unshare's own words, which name the call that failed, not what has forbidden it
        return f"{error} ({why_forbidden()})" if os.geteuid() and "unshare:" in str(error) else str(error)
    return None
