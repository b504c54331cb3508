"""Who am I: rank, local rank and world size as a launcher's environment tells them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """The place of one process in a job.

    ``rank`` counts over the job (0 … world_size - 1), ``local_rank`` over the processes of one host
    (0 … local_size - 1), ``node_rank`` over the hosts (0 … num_nodes - 1).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    host: str = "localhost"
    launcher: str = "none"
