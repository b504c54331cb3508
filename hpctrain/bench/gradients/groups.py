"""Who is compared: each competitor is a group of processes of its own, here as data.

What a competitor does in its processes is in ``contestants``, how processes come about in ``launching``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """One competitor.

    ``launcher`` starts its ranks, ``engine`` is the library it needs (by the name of ours over it) and ``part`` what
    that library must have been built with. ``key`` names the ratio of its time to ours; groups of ours have none.
    """

    name: str
    launcher: str
    engine: str
    part: str
    what: str
    key: str | None = None


GROUPS = (
    Group("hpctrain_horovod", "mpirun", "horovod", "MPI", "our exchange over Horovod's MPI operations"),
    Group("hpctrain_mpi", "mpirun", "mpi", "MPI", "our exchange over mpi4py"),
    Group("hpctrain_torch", "torchrun", "torch", "gloo", "our exchange over torch.distributed"),
    Group(
        "horovod_mpi", "mpirun", "horovod", "MPI",
        "hvd.DistributedOptimizer, in fp16 with Compression.fp16, MPI controller", "horovod_mpi_fp16",
    ),
    Group(
        "horovod_gloo", "horovodrun", "horovod", "gloo",
        "hvd.DistributedOptimizer, in fp16 with Compression.fp16, Gloo controller", "horovod_gloo_fp16",
    ),
    Group(
        "ddp", "torchrun", "torch", "gloo",
        "DistributedDataParallel, in fp16 with fp16_compress_hook", "ddp_fp16_hook",
    ),
    Group(
        "mpi4py_naive", "mpirun", "mpi", "MPI",
        "after backward, comm.Allreduce of each gradient by itself, in fp16 cast before and after", "mpi4py_naive",
    ),
    Group(
        "chainermn_style", "mpirun", "mpi", "MPI",
        "after backward, all gradients packed into one buffer, one all-reduce, divided, unpacked", "chainermn_style",
    ),
)  # fmt: skip

PEERS = tuple(group for group in GROUPS if group.key)
OURS = tuple(group for group in GROUPS if not group.key)


def group_named(name: str) -> Group:
    """The group of that name."""
    return next(group for group in GROUPS if group.name == name)
