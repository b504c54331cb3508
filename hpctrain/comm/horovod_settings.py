"""Horovod's own settings: what our engine starts it with, and what a configuration may ask for instead.

Horovod reads them from its environment, once, when it starts. Nothing here imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from hpctrain.errors import UserError

FUSION_THRESHOLD = "HOROVOD_FUSION_THRESHOLD"
CYCLE_TIME = "HOROVOD_CYCLE_TIME"
HIERARCHICAL_ALLREDUCE = "HOROVOD_HIERARCHICAL_ALLREDUCE"

# Horovod's own fusion packs buffers in an order that depends on timing, and sums in another order each time: with
# it, one buffer gave 2 to 9 different results over repeated runs. Buckets arrive fused already.
DEFAULTS = {FUSION_THRESHOLD: "0", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
# What Horovod does when nothing is set, spelt out: once set, a threshold holds over a restart until it is set again.
RELEASED = {FUSION_THRESHOLD: str(128 << 20), "HOROVOD_DYNAMIC_PROCESS_SETS": "0"}

#: each key of the section comm.horovod: its variable, and its value there
KEYS: dict[str, tuple[str, Callable[[float], str]]] = {
    "fusion_threshold_mib": (FUSION_THRESHOLD, lambda mib: str(round(mib * 2**20))),
    "cycle_time_ms": (CYCLE_TIME, lambda ms: f"{ms:g}"),
    "hierarchical_allreduce": (HIERARCHICAL_ALLREDUCE, lambda wanted: str(int(wanted))),
}


def ask_for(engine: str, device: torch.device, wanted: Mapping[str, float | None]) -> None:
    """Put those of ``KEYS`` that are ``wanted`` (not None) into the environment, before ``engine`` starts.

    Raises UserError for another engine, for what has no effect on ``device``, and where the variable already says
    something else.
    """
    for key, value in wanted.items():
        if value is None:
            continue
        if engine != "horovod":
            raise UserError(
                f"comm.horovod.{key} is a setting of Horovod's, but the engine of this job is {engine}: "
                "leave it out, or set comm.engine=horovod"
            )
        if key == "hierarchical_allreduce" and value and device.type != "cuda":
            raise UserError(
                "comm.horovod.hierarchical_allreduce is done by NCCL, but this job's buffers are not on a GPU: "
                "leave it out, or set gradients.reduction=grid"
            )
        variable, spell = KEYS[key]
        spelt = spell(value)
        if os.environ.setdefault(variable, spelt) != spelt:
            raise UserError(
                f"comm.horovod.{key} is {value:g}, which is {variable}={spelt}, but the environment says "
                f"{os.environ[variable]}: leave one of them out"
            )


def check_started(*, over_mpi: bool) -> None:
    """Raise UserError where Horovod, now that it has started, would pass over what it was asked for."""
    if os.environ.get(HIERARCHICAL_ALLREDUCE, "0") != "0" and not over_mpi:
        raise UserError(
            "Horovod's hierarchical all-reduce works over MPI only, and here it runs on Gloo: start it with mpirun or "
            "horovodrun --mpi, or leave comm.horovod.hierarchical_allreduce out"
        )


def require_released() -> None:
    """Raise UserError where the environment says more than can be taken back for a Horovod as released."""
    # Not only for the comparison's sake: with both the cycle time and the threshold set, a restart of 0.28.1 is a
    # segmentation fault (ParameterManager::BayesianParameter::SetValue).
    for key in ("cycle_time_ms", "hierarchical_allreduce"):
        variable = KEYS[key][0]
        if variable in os.environ:
            raise UserError(
                f"{variable} is set, but Horovod is to run as released: unset it, or leave comm.horovod.{key} out"
            )


def remark(engine: str) -> str:
    """What a run over ``engine`` has to tell of these settings; empty when there is nothing."""
    threshold = os.environ.get(FUSION_THRESHOLD, "0")
    if engine != "horovod" or threshold == "0":
        return ""
    return f"; Horovod's fusion up to {int(threshold) / 2**20:g} MiB follows timing: this run is not reproducible"
