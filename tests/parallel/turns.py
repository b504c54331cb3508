"""Ranks that step through all-reduces until asked to stop; run under a launcher by test_turns_ranks.

``--rank R --at S`` sends SIGUSR1 to rank R within step S; with ``--hang`` another rank never comes back from that step.
"""

from __future__ import annotations

import argparse
import os
import signal
import time

import torch

from hpctrain.comm import registry
from hpctrain.comm.patience import Limits
from hpctrain.comm.side_channel import SideChannel
from hpctrain.comm.turns import Stopped, Turns
from hpctrain.comm.watch import Watch
from hpctrain.launch.preempt import Requests
from hpctrain.topology.ranks import detect
from tests.parallel.launch import report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--at", type=int, default=20)
    parser.add_argument("--hang", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = registry.create(args.engine, detect(os.environ), torch.device("cpu"), timeout_s=120)
    channel = SideChannel.open(comm)
    watch = Watch(channel, comm, Limits(15, 30))
    steps = 0
    with Requests(["USR1", "USR2", "TERM"]) as requests, watch.guard():
        turns = Turns(channel, comm.topology, requests.asked)
        turns.start()
        try:
            while steps < 100_000:
                turns.begin()
                watch.beat(steps, "data")
                if steps == args.at and comm.rank == args.rank:
                    os.kill(os.getpid(), signal.SIGUSR1)
                if steps == args.at and args.hang and comm.rank != args.rank:
                    time.sleep(1000)
                time.sleep(0.002 * comm.rank)
                watch.beat(steps, "exchange")
                comm.all_reduce_(torch.ones(100)).wait()
                steps += 1
        except Stopped as stopped:
            os.kill(os.getpid(), signal.SIGTERM)  # once more, which changes nothing
            report({"steps": steps, "reason": stopped.reason})
        comm.barrier()
    turns.close()
    watch.close()
    comm.close()


if __name__ == "__main__":
    main()
