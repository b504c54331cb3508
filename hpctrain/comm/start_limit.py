"""An end to waiting for ranks that do not come: engines start together, and say nothing while one is missing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpctrain.comm.patience import Limit
from hpctrain.comm.process import end_process
from hpctrain.topology.ranks import Topology


@contextmanager
def start_limit(topology: Topology, engine: str, limit: Limit) -> Iterator[Callable[[str], None]]:
    """End this process when the block, which starts ``engine``, takes longer than ``limit``.

    Yields what the block calls as soon as it knows better what it starts. It must leave the interpreter to other
    threads while it waits. Alone, a rank waits for nobody.
    """
    started = threading.Event()

    def start(what: str) -> None:
        nonlocal engine
        engine = what

    def wait() -> None:
        if not started.wait(limit.seconds):
            print(
                f"hpctrain: rank {topology.rank} of {topology.world_size} on host {topology.host} has been waiting "
                f"{limit.seconds:.0f} s for the engine ({engine}) to start: check that all ranks were started and that "
                f"their hosts reach each other, or raise {limit.option}",
                file=sys.stderr,
                flush=True,
            )
            end_process(1)

    if topology.world_size > 1:
        threading.Thread(target=wait, name="hpctrain-start", daemon=True).start()
    try:
        yield start
    finally:
        started.set()
