"""A job whose chosen rank misbehaves in a chosen way; run under a launcher by test_faults."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import time

import torch

from hpctrain.comm import registry
from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.comm.patience import Limits
from hpctrain.comm.side_channel import SideChannel
from hpctrain.comm.watch import Watch
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import detect

FAULTY_STEP = 3
SUSPENDED_S = 15


def misbehave(fault: str) -> None:
    if fault == "raise":
        raise ValueError("the loader broke\nwith a second line")
    if fault == "user-error":
        raise UserError("no such file: name another one")
    if fault == "machine-error":
        raise MachineError("disk full on /scratch")
    if fault == "interrupt":
        raise KeyboardInterrupt
    if fault == "sleep":
        time.sleep(1000)
    if fault == "hold-interpreter":
        ctypes.PyDLL(None).sleep(1000)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop-seen":
        time.sleep(3)  # so that the others' watches have seen where it stands
    if fault in ("stop", "stop-seen"):
        os.kill(os.getpid(), signal.SIGSTOP)


def suspend() -> None:
    """Stand still, as in a job that Slurm suspends: all ranks do, and go on."""
    me = os.getpid()
    others = subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {me}; sleep {SUSPENDED_S}; kill -CONT {me}"])
    others.wait()


def run(comm: Communicator, watch: Watch, fault: str, rank: int, steps: int) -> None:
    if fault == "startup-sleep" and comm.rank == rank:
        time.sleep(1000)
    for step in range(steps):
        watch.beat(step, "data")
        time.sleep(0.05)
        if step == FAULTY_STEP and fault == "collective-user-error":
            on_rank_zero(comm, lambda: misbehave("user-error"))
        if step == FAULTY_STEP and fault == "same-everywhere":
            misbehave("raise")
        if step == FAULTY_STEP and fault == "suspend":
            suspend()
        if step == FAULTY_STEP and comm.rank == rank:
            misbehave(fault)
        watch.beat(step, "exchange")
        comm.all_reduce_(torch.ones(100)).wait()
    watch.beat(steps, "end")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--fault", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = registry.create(args.engine, detect(os.environ), torch.device("cpu"), timeout_s=120)
    watch = Watch(SideChannel.open(comm), comm, Limits(args.timeout, args.timeout))
    with watch.guard():
        run(comm, watch, args.fault, args.rank, args.steps)
        comm.barrier()
    if args.fault == "late-leaver" and comm.rank == args.rank:
        time.sleep(4)
    watch.close()
    comm.close()
    print(f"rank {comm.rank} came to a good end")


if __name__ == "__main__":
    main()
