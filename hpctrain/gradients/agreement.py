"""The check, once before the first exchange, that all ranks are about to exchange the same gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hpctrain.arena import Bucket, dense_strides
from hpctrain.comm.base import Communicator
from hpctrain.errors import UserError


def describe_buckets(buckets: Sequence[Bucket]) -> list[str]:
    """One line for each gradient, in the order of exchange, and for each bucket's length."""
    lines = []
    for bucket in buckets:
        for slot in bucket.slots:
            parameter = slot.parameter
            shape, dtype = list(parameter.shape), str(parameter.dtype).removeprefix("torch.")
            lines.append(f"parameter {slot.name!r} {shape} {dtype} strides {list(dense_strides(parameter))}")
        lines.append(f"a bucket of {bucket.buffer.numel()} elements")
    return lines


def check_agreement(comm: Communicator, lines: Sequence[str]) -> None:
    """Return when all ranks pass the same ``lines``. Collective; lines travel only when they differ.

    Raises UserError, on every rank, naming the first rank that differs from rank 0 and the line.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = comm.all_gather_object(digest)
    if all(other == digests[0] for other in digests):
        return
    ranks = comm.all_gather_object(list(lines))
    rank = next(rank for rank, other in enumerate(ranks) if other != ranks[0])
    position = next(
        (at for at, (mine, other) in enumerate(zip(ranks[rank], ranks[0], strict=False)) if mine != other),
        min(len(ranks[rank]), len(ranks[0])),
    )
    found, expected = (table[position] if position < len(table) else "nothing" for table in (ranks[rank], ranks[0]))
    raise UserError(
        f"rank {rank} exchanges {found} where rank 0 exchanges {expected}; "
        "build the same model with the same configuration on every rank"
    )
