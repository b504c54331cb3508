"""The cluster for people.

python -m tests.cluster up 4 --rate 1gbit     # a shell on the head; its end is the cluster's end
on n2 ip address                              # there: a command on a host
ip link set n3 down                           # there: pull a cable
python -m tests.cluster down                  # folders that killed runs have left
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from tests.cluster.cluster import ON, Cluster, leftovers, obstacle


def up(num_hosts: int, rate: str | None) -> int:
    """A shell on the head of a new cluster; its exit status."""
    if reason := obstacle():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with Cluster(num_hosts, rate) as cluster:
        names = ", ".join(host.name for host in cluster.hosts)
        print(f"hosts: {names}; `on HOST COMMAND` runs a command there; shared folder: {cluster.shared}", flush=True)
        path = f"{ON.parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        # In this terminal's session, unlike Host.start, so that job control works.
        return subprocess.call(cluster.head.command(["bash"]), env={**os.environ, "PATH": path, "PS1": "[head] "})


def down() -> int:
    """Remove what runs that were killed have left; running clusters are spared."""
    for folder in leftovers():
        shutil.rmtree(folder)
        print(f"removed {folder}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="Several hosts on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="bring hosts up and open a shell on the head")
    start.add_argument("hosts", type=int)
    start.add_argument("--rate", help="of each cable, as in tc(8), such as 1gbit")
    commands.add_parser("down", help="remove what killed runs have left")
    asked = parser.parse_args()
    return up(asked.hosts, asked.rate) if asked.command == "up" else down()


if __name__ == "__main__":
    sys.exit(main())
