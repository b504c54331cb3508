"""The cluster for people.

python -m tests.cluster up 4 --rate 1gbit --latency-us 500     # a shell on the head; its end is the cluster's end
python -m tests.cluster up 4 --slurm                           # the same with Slurm: sinfo, sbatch and srun work there
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
from tests.cluster.host import HostError, with_system_path
from tests.cluster.slurm import Slurm, slurm_obstacle


def up(asked: argparse.Namespace) -> int:
    """A shell on the head of a new cluster; its exit status."""
    if reason := slurm_obstacle() if asked.slurm else obstacle():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    cables = {"rate": asked.rate, "latency_us": asked.latency_us}
    try:
        if not asked.slurm:
            with Cluster(asked.hosts, **cables) as cluster:
                return shell(cluster, dict(os.environ))
        with Slurm(asked.hosts, asked.tasks, gpus=asked.gpus, accounting=asked.accounting, **cables) as slurm:
            return shell(slurm.cluster, slurm.env)
    except (HostError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def shell(cluster: Cluster, env: dict[str, str]) -> int:
    names = ", ".join(host.name for host in cluster.hosts)
    print(f"hosts: {names}; `on HOST COMMAND` runs a command there; shared folder: {cluster.shared}", flush=True)
    env = with_system_path(env)
    env |= {"PATH": f"{ON.parent}:{env['PATH']}", "PS1": "[head] "}
    # In this terminal's session, unlike Host.start, so that job control works.
    return subprocess.call(cluster.head.command(["bash"]), env=env)


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
    start.add_argument("--latency-us", type=int, default=0, help="of each cable, one way, in microseconds")
    start.add_argument("--slurm", action="store_true", help="with Slurm on them")
    start.add_argument("--tasks", type=int, default=2, help="that a node of Slurm has room for (default 2)")
    start.add_argument("--gpus", type=int, default=0, help="that a node of Slurm claims to have")
    start.add_argument("--accounting", action="store_true", help="sacct works, two seconds later")
    commands.add_parser("down", help="remove what killed runs have left")
    asked = parser.parse_args()
    return up(asked) if asked.command == "up" else down()


if __name__ == "__main__":
    sys.exit(main())
