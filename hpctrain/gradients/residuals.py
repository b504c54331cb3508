"""What error feedback owes to the next steps, to a checkpoint and back: every rank has residuals of its own.

On rank 0 they take the memory of the gradients in float32 times the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator
from hpctrain.errors import UserError


@torch.no_grad()
def gather_residuals(comm: Communicator, residuals: Sequence[Tensor]) -> dict[str, Tensor]:
    """By number of the bucket, [world_size, n] on the host, on rank 0; nothing on the others. Collective."""
    gathered = {}
    for number, residual in enumerate(residuals):
        rows = residual.new_empty(comm.world_size * residual.numel()) if comm.rank == 0 else None
        comm.gather_(rows, residual).wait()
        if rows is not None:
            gathered[f"bucket-{number:03d}"] = rows.view(comm.world_size, -1).cpu()
    return gathered


@torch.no_grad()
def restore_residuals(comm: Communicator, residuals: Sequence[Tensor], saved: Mapping[str, Tensor]) -> None:
    """Give each rank its own again; on another number of ranks each takes their mean, which owes as much.

    Raises UserError where the buckets are others.
    """
    if len(saved) != len(residuals):
        raise UserError(
            f"the checkpoint holds what fp16_ef owes {len(saved)} buckets and this run has {len(residuals)}; "
            "restore gradients.bucket_mib and gradients.last_bucket_mib, or set gradients.compression=fp16"
        )
    for residual, rows in zip(residuals, (saved[name] for name in sorted(saved)), strict=True):
        mine = rows[comm.rank] if len(rows) == comm.world_size else rows.mean(0)
        # Buckets of another number of ranks end in more or less padding.
        length = min(mine.numel(), residual.numel())
        residual.zero_()
        residual[:length].copy_(mine[:length])
