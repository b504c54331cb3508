"""The end of a run: its record, its picture and the closing words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpctrain.comm.agree import on_rank_zero
from hpctrain.config.load import config_hash
from hpctrain.errors import HpctrainError
from hpctrain.metrics.clock import RunTimes
from hpctrain.metrics.jsonfiles import read_log_if_any
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.picture import draw_learning_curve
from hpctrain.metrics.progress import Display, Summary
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.record import parameters_sha256, write_record
from hpctrain.metrics.stragglers import stragglers_of
from hpctrain.train.build import Feeds
from hpctrain.train.loop import Loop
from hpctrain.train.rundir import RunDirectory

#: Names of replaced samples kept in a record; their number is exact whatever it is.
_NAMES_KEPT = 1000


def finish(
    loop: Loop, feeds: Feeds, run: RunDirectory, provenance: Provenance | None, notes: dict[str, Any]
) -> Summary:
    """Write ``record.json`` on rank 0, which has the ``provenance``; returns the closing figures. Collective.

    ``notes`` are further keys of the record: how the engine was chosen, why the run ended.
    """
    comm, progress = loop.parts.comm, loop.progress
    times = loop.parts.clock.summary()
    ranks = comm.all_gather_object(_row_of_this_rank(loop, feeds, times))

    def write() -> None:
        assert provenance is not None
        record = build_record(loop, feeds, times) | notes
        record["ranks"] = ranks
        record["stragglers"] = stragglers_of(read_log_if_any(run.steps))
        record["launch"] = _launch_record(loop, run)
        record["provenance"] = provenance.to_record()
        write_record(run.record, record)

    on_rank_zero(comm, write)
    accuracy = progress.evaluation or {}
    return Summary(
        top1=accuracy.get("top1"),
        top5=accuracy.get("top5"),
        images_per_s=times.throughput(loop.parts.plan.batch_global)["images_per_s"]["median"],
        minutes=progress.train_s / 60,
        picture=None,
        record=run.record,
    )


def show_end(run: RunDirectory, display: Display, summary: Summary, title: str) -> None:
    """Draw the learning curve, and show the closing words.

    No rank that is watched may wait for it: from a busy file system, importing matplotlib takes longer than one may.
    """
    try:
        if steps := read_log_if_any(run.steps):
            draw_learning_curve(run.picture, steps, read_log_if_any(run.evals), title)
            summary = replace(summary, picture=run.picture)
    except HpctrainError as error:
        # The run is whole, and would not be done again for its picture.
        display.message(f"no learning curve was drawn: {error}")
    display.finish(summary)


def _launch_record(loop: Loop, run: RunDirectory) -> dict[str, Any]:
    launches = read_launches(run.path)
    return {
        "restarts": len(launches) - 1,
        "preemptions": sum(launch.preempted for launch in launches),
        "checkpoint": loop.saver.to_record(),
    }


def build_record(loop: Loop, feeds: Feeds, times: RunTimes) -> dict[str, Any]:
    """The keys of ``record.json`` that this rank knows by itself."""
    parts, progress = loop.parts, loop.progress
    comm, config = parts.comm, parts.config
    evaluation: dict[str, Any] = progress.evaluation or {"top1": None, "top5": None, "seen": 0}
    versions = comm.versions()
    buffers = parts.exchange.buffers
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
        "system": loop.journal.system.to_record(),
        "parameters_sha256": parameters_sha256(parts.model.named_parameters()),
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
