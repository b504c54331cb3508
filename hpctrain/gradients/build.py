"""From the section `gradients` of a configuration to the exchange it asks for."""

from __future__ import annotations

from torch.nn import Module

from hpctrain.comm.base import Communicator
from hpctrain.config.schema import GradientsConfig
from hpctrain.gradients.reducer import GradientExchange

_MIB = 1 << 20


def build_exchange(
    model: Module, comm: Communicator, config: GradientsConfig, *, judge: bool = False
) -> GradientExchange:
    """The exchange of ``model``'s gradients; every step ends with a verdict where ``judge`` or clipping wants one.

    Collective. Raises UserError as ``GradientExchange`` does.
    """
    return GradientExchange(
        model,
        comm,
        reduction=config.reduction,
        compression=config.compression,
        bucket_bytes=round(config.bucket_mib * _MIB),
        last_bucket_bytes=round(config.last_bucket_mib * _MIB),
        grid=config.grid,
        judge=judge,
        norm=config.clip_norm is not None,
    )
