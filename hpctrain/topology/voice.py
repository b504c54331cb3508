"""The words of error messages that parts share, and who tells of an error while ranks cannot talk to each other yet."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from hpctrain.errors import HpctrainError, UserError
from hpctrain.topology.ranks import Topology, detect

#: Ranks other than 0 wait this long before they repeat what all ranks may have found: they have not met yet, and on a
#: shared file system one imports what it needs seconds after another.
_PRECEDENCE_S = 3.0


def sentence(error: HpctrainError) -> str:
    """How the command line prints an error that needs no traceback."""
    return f"hpctrain: {error}"


def listed(names: Sequence[object], most: int) -> str:
    """The first ``most`` names, and how many more there are."""
    first = ", ".join(map(str, names[:most]))
    return f"{first} and {len(names) - most} more" if len(names) > most else first


def report_early(error: HpctrainError, environ: Mapping[str, str]) -> int:
    """Print an error that came before ranks could talk, once where possible; returns the exit status.

    Rank 0 prints at once, and launchers end the other ranks when it leaves; those that are still there after a
    while print it themselves, with their place, since rank 0 has not found it on its host.
    """
    try:
        topology = detect(environ)
    except UserError:
        topology = Topology()
    place = ""
    if topology.rank > 0:
        time.sleep(_PRECEDENCE_S)
        place = f"[rank {topology.rank} on host {topology.host}] "
    print(place + sentence(error), file=sys.stderr, flush=True)
    return error.exit_code
