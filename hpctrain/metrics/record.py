"""``record.json``: one summary of a finished run, for reports that need no re-run.

It appears when a run has ended, complete, or not at all. The stable keys are the model below; more may be
added beside them. Reading it needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpctrain.errors import UserError
from hpctrain.metrics.jsonfiles import to_json_value, write_json

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA: Literal[1] = 1

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
#: a figure that a run may lack, or that was not finite
Measured = float | None


class _Part(BaseModel):
    """Known keys are checked, others kept."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)


class PlanPart(_Part):
    """Who trained on how much."""

    world_size: Count
    nodes: Count
    workers: Count
    batch_per_worker: Count
    batch_global: Count
    steps_per_epoch: Count
    epochs: Count


class Rate(_Part):
    """Images per second over steps after warm-up."""

    median: Measured
    p5: Measured
    p95: Measured


class ThroughputPart(_Part):
    """Rates, and beside them the rule by which steps were left out."""

    images_per_s: Rate


class AccuracyPart(_Part):
    """The last evaluation; null when there was none."""

    top1: Fraction | None
    top5: Fraction | None
    seen: Count
    """samples judged"""


class PhasesPart(_Part):
    """Median seconds a step, rank 0."""

    data: Measured
    forward: Measured
    backward: Measured
    exposed_comm: Measured
    optimizer: Measured


class DataPart(_Part):
    """What the pictures were."""

    loader: str
    real: bool
    """false for synthetic pictures"""
    samples_seen: Count
    corrupt_skipped: Count


class WirePart(_Part):
    """What the gradient exchange sent."""

    dtype: str
    bytes_per_step: Count
    """of one rank's gradients, before the engine's algorithm multiplies them"""
    overflow: Count
    underflow: Count


class EnginePart(_Part):
    """What moved it."""

    name: str
    version: str | None


class RankRow(_Part):
    """One rank's part: medians before the collective, where a slow rank shows."""

    rank: Count
    host: str
    local_rank: Count
    data_s: Measured
    forward_s: Measured
    corrupt_skipped: Count


class Record(_Part):
    """The stable keys of ``record.json``."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    config_hash: str
    plan: PlanPart
    throughput: ThroughputPart
    accuracy: AccuracyPart
    phases_s: PhasesPart
    data: DataPart
    wire: WirePart
    engine: EnginePart
    ranks: Annotated[list[RankRow], Field(min_length=1)]
    parameters_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    provenance: dict[str, Any]


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Check ``record`` against the stable keys and write it whole; figures that are not finite become null.

    Raises pydantic's ValidationError for a record that lacks a key (a fault of the caller), MachineError when
    the file cannot be written.
    """
    checked = Record.model_validate(to_json_value({"schema": SCHEMA, **record}))
    write_json(path, checked.model_dump(by_alias=True))


def read_record(path: Path) -> Record:
    """The record in ``path``.

    Raises UserError when it is missing, is no JSON, has another schema or lacks a stable key.
    """
    try:
        return Record.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a run that has ended") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is no record of this version: {key}: {first['msg']}; run it again") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it from a copy or run it again") from error


def parameters_sha256(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over all tensors in order of their names, the same for every memory layout and device.

    Hashed for each: name, dtype and shape as text, each with a zero byte, then the elements in row-major
    order of the logical shape, as they are in memory.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        elements = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        digest.update(elements.view(torch.uint8).numpy().data)
    return digest.hexdigest()
