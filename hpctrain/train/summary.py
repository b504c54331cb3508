"""The end of a run: its record, its picture and the closing words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpctrain.comm.agree import on_rank_zero
from hpctrain.config.load import config_hash
from hpctrain.metrics.clock import RunTimes
from hpctrain.metrics.jsonfiles import read_log_if_any
from hpctrain.metrics.picture import draw_learning_curve
from hpctrain.metrics.progress import Summary
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.record import parameters_sha256, write_record
from hpctrain.metrics.stragglers import stragglers_of
from hpctrain.train.build import Feeds
from hpctrain.train.loop import Loop

#: Names of replaced samples kept in a record; their number is exact whatever it is.
_NAMES_KEPT = 1000


def finish(loop: Loop, feeds: Feeds, provenance: Provenance, notes: dict[str, Any], title: str) -> Summary:
    """Write ``record.json`` and the learning curve on rank 0; returns the closing figures. Collective.

    ``notes`` are further keys of the record: how the engine and loader were chosen, why the run ended.
    """
    times = loop.parts.clock.summary()
    record = build_record(loop, feeds, times, provenance) | notes
    run = loop.run

    def write() -> None:
        steps = read_log_if_any(run.steps)
        write_record(run.record, record | {"stragglers": stragglers_of(steps)})
        if steps:
            draw_learning_curve(run.picture, steps, read_log_if_any(run.evals), title)

    on_rank_zero(loop.parts.comm, write)
    accuracy = loop.progress.evaluation or {}
    return Summary(
        top1=accuracy.get("top1"),
        top5=accuracy.get("top5"),
        images_per_s=record["throughput"]["images_per_s"]["median"],
        minutes=loop.progress.train_s / 60,
        picture=_if_there(run.picture),
        record=run.record,
    )


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def build_record(loop: Loop, feeds: Feeds, times: RunTimes, provenance: Provenance) -> dict[str, Any]:
    """The keys of ``record.json``. Collective: every rank tells its own part."""
    parts, progress = loop.parts, loop.progress
    comm, config = parts.comm, parts.config
    evaluation: dict[str, Any] = progress.evaluation or {"top1": None, "top5": None, "seen": 0}
    versions = comm.versions()
    buffers = parts.exchange.buffers
    ranks = comm.all_gather_object(_row_of_this_rank(loop, feeds, times))
    return {
        "config_hash": config_hash(config),
        "plan": parts.plan.to_record(),
        "throughput": times.throughput(parts.plan.batch_global),
        "accuracy": evaluation,
        "phases_s": times.phases_s,
        "outside_s": times.outside_s,
        "train_s": progress.train_s,
        "steps": progress.step,
        "data": {
            "loader": feeds.train_loader.name,
            "loader_choice": feeds.loader_reason,
            "real": feeds.train_loader.name != "synthetic",
            "samples_seen": progress.samples_seen,
            "corrupt_skipped": len(progress.corrupt),
            "corrupt": progress.corrupt[:_NAMES_KEPT],
        },
        "wire": {
            "dtype": "+".join(sorted({str(buffer.dtype).removeprefix("torch.") for buffer in buffers})) or "none",
            "bytes_per_step": sum(buffer.nbytes for buffer in buffers),
            **progress.wire,
            "reduction": parts.exchange.transport.name,
            "reduction_choice": parts.exchange.transport.reason,
        },
        "engine": {"name": comm.name, "version": versions.get(comm.name), "versions": versions},
        "ranks": ranks,
        "system": loop.journal.system.to_record(),
        "parameters_sha256": parameters_sha256(parts.model.named_parameters()),
        "provenance": provenance.to_record(),
    }


def _row_of_this_rank(loop: Loop, feeds: Feeds, times: RunTimes) -> dict[str, Any]:
    topology = loop.parts.comm.topology
    return {
        "rank": topology.rank,
        "host": topology.host,
        "local_rank": topology.local_rank,
        "data_s": times.phases_s["data"],
        "forward_s": times.phases_s["forward"],
        "backward_s": times.phases_s["backward"],
        "corrupt_skipped": len(feeds.corrupt),
    }
