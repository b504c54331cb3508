"""What Open MPI is told before it starts, for Horovod and for mpi4py. What a user has set is kept.

Between hosts: left to itself it takes twice the time that a ring needs for a large all-reduce on TCP. Its rules pick
other algorithms than a ring for large messages, its "put" protocol lets the two directions of a pair wait for each
other, and it asks the receiver before it sends more than 64 KiB: an answer at each turn of the ring. Measured between
four hosts on cables of 1 Gbit/s, ResNet-50's gradients in fp16, as a multiple of the ring's bound: 1.89 as it comes;
with rings 1.23 over Horovod and 1.22 over mpi4py; sending a bucket's part at once, 1.07 and 1.05.

Everywhere: a thread that waits for a message lets others run. Horovod's background thread waits like that once in
each of its cycles, and where all cores compute it took them from the ranks' own work: the exchange of ResNet-50's
gradients in fp16 between two ranks on two cores took 59 ms, and 31 ms with what is set here.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpctrain.topology.ranks import Topology

#: Rings for all-gathers from 64 KiB and all-reduces from 1 MiB on; below, where latency counts, Open MPI's own choice.
RULES = Path(__file__).with_name("open_mpi_rules.conf")

EVERYWHERE = {"OMPI_MCA_mpi_yield_when_idle": "1"}
#: What may be sent unasked: a quarter of the default bucket in fp32, a half of it in fp16, and the header.
_EAGER_BYTES = (4 << 20) + (64 << 10)

BETWEEN_HOSTS = {
    "OMPI_MCA_btl_tcp_eager_limit": str(_EAGER_BYTES),
    "OMPI_MCA_btl_tcp_flags": "send",
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(RULES),
}


def tune(topology: Topology) -> None:
    """Set the variables that are not set, before MPI starts."""
    for variable, value in (EVERYWHERE | (BETWEEN_HOSTS if topology.num_nodes > 1 else {})).items():
        os.environ.setdefault(variable, value)
