"""One run, from its data set to its record, or to the checkpoint that a later launch goes on from."""

from __future__ import annotations

import os
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.comm.turns import Stopped
from hpctrain.config.load import dump_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.launch.continuing import TrainCommand
from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.preempt import Requests
from hpctrain.launch.timelimit import TimeLimit, job_end_s
from hpctrain.metrics.jsonfiles import write_atomic
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.progress import Display, make_display
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.steplog import StepLog
from hpctrain.train.build import Feeds, build_feeds, build_parts, open_data, plan_for
from hpctrain.train.journal import Journal, Sink
from hpctrain.train.launches import Launches
from hpctrain.train.loop import Loop
from hpctrain.train.resume import choose_checkpoint, restore
from hpctrain.train.rundir import RunDirectory
from hpctrain.train.samples import SampleLog
from hpctrain.train.saver import Saver
from hpctrain.train.session import Session
from hpctrain.train.state import Progress
from hpctrain.train.summary import finish

_MOST_NAMED = 8


def train(
    config: Config, session: Session, run: RunDirectory, resume: str, command: TrainCommand, requests: Requests
) -> bool:
    """Train until the run is finished (True), or until ``requests`` end this launch before that (False). Collective.

    Either way the last checkpoint is written when this returns. After an error one may still be under way: then the
    run directory stays locked until this process ends.
    """
    comm = session.comm
    check_same_config(comm, config)
    provenance = Provenance(sorted(set(comm.all_gather_object(comm.topology.host))))
    dataset = open_data(comm, config)
    plan = plan_for(config, dataset, comm.topology)
    parts = build_parts(config, plan, session)
    passed_over: list[str] = []
    checkpoint = choose_checkpoint(comm, run.checkpoints, resume, passed_over.append)
    progress = Progress() if checkpoint is None else restore(parts, checkpoint)
    on_rank_zero(comm, lambda: write_atomic(run.config, dump_config(config).encode()))
    feeds = build_feeds(parts, dataset, session)
    display = make_display(comm.rank == 0, epochs=plan.epochs, total_steps=plan.total_steps, first_step=progress.step)
    sinks = open_sinks(config, run, progress) if comm.rank == 0 else []
    journal = Journal(parts, feeds, display, sinks, run.path)
    saver = Saver(parts, run.checkpoints, progress.step)
    try:
        display.start(f"{command.title} in {run.path}", plan.describe())
        remarks = [*passed_over, *([] if checkpoint is None else [f"going on from step {progress.step}"])]
        _announce(display, session, feeds, remarks)
        batches = feeds.train_batches(progress)
        loop = Loop(parts, progress, batches, feeds.evaluate, journal, run, saver, session.turns)
        ended = loop.reason_to_stop()
        if ended is not None and on_rank_zero(comm, run.record.exists):
            display.message(_has_ended(ended, run.record))
            return True
        return _Launch(loop, feeds, display, requests, command).go({"engine_choice": session.engine_reason}, provenance)
    finally:
        if not saver.close():
            run.keep_locked()
        journal.close()
        feeds.close()
        parts.exchange.close()


class _Launch:
    """One taking-up of a run: its entry in the list of launches, its logs of samples, and how it is left."""

    def __init__(self, loop: Loop, feeds: Feeds, display: Display, requests: Requests, command: TrainCommand) -> None:
        self._loop, self._feeds, self._display = loop, feeds, display
        self._requests, self._command = requests, command
        self._launches = Launches(loop.run.path)
        comm, progress, plan = loop.parts.comm, loop.progress, loop.parts.plan
        on_rank_zero(comm, loop.run.forget_record)
        begin = partial(self._launches.begin, progress.step, plan.world_size, plan.train_samples)
        self._number: int = on_rank_zero(comm, begin)
        if loop.parts.config.data.log_samples:
            loop.saver.samples = SampleLog(loop.run.path, comm.rank, self._number)
            loop.batches = loop.saver.samples.noting(loop.batches, progress.step, plan.accumulation)
        if comm.rank == 0:
            self._respect_time_limit()

    def go(self, notes: dict[str, Any], provenance: Provenance) -> bool:
        """Train; whether the run is finished. Collective."""
        loop = self._loop
        try:
            reason = loop.train()
        except Stopped as stopped:
            self._requests.agreed()
            self._end(stopped.reason, preempted=True)
            step = loop.progress.step
            where = f"after step {step}, its checkpoint is written" if step else "before the first step"
            self._display.message(f"stopped by {stopped.reason}, {where} (exit status {PREEMPTED})")
            self._display.message(self._command.to_continue(loop.run.path))
            return False
        self._end(reason, preempted=False)
        launches = on_rank_zero(loop.parts.comm, self._to_record)
        record = {"ended": reason, "launch": launches, **notes}
        self._display.finish(finish(loop, self._feeds, provenance, record, self._command.title))
        return True

    def _end(self, reason: str, *, preempted: bool) -> None:
        """Save, wait until it is written, and note the end."""
        loop = self._loop
        loop.save()
        loop.saver.wait()
        step, write_s = loop.progress.step, max(loop.saver.writes_s, default=0.0)
        end = partial(self._launches.end, self._number, step, reason, preempted=preempted, write_s=write_s)
        on_rank_zero(loop.parts.comm, end)

    def _to_record(self) -> dict[str, Any]:
        launches = read_launches(self._loop.run.path)
        return {
            "restarts": len(launches) - 1,
            "preemptions": sum(launch.preempted for launch in launches),
            "checkpoint": self._loop.saver.to_record(),
        }

    def _respect_time_limit(self) -> None:
        """Let the end of the job's time ask for the last checkpoint, where that leaves time to train."""
        end_s = job_end_s(os.environ)
        if end_s is None:
            return
        saver, turns, margin_s = self._loop.saver, self._loop.turns, self._loop.parts.config.launch.margin_s
        earlier_s = max((launch.write_s for launch in read_launches(self._loop.run.path)), default=0.0)
        limit = TimeLimit(end_s, margin_s, lambda: max([earlier_s, *saver.writes_s]), lambda: turns.turn_s)
        end = f"{datetime.fromtimestamp(end_s):%Y-%m-%d %H:%M:%S}"
        if limit.left_s <= 0:
            self._display.message(
                f"the job's time limit, {end}, is closer than launch.margin_s = {margin_s:g} s allows for a last "
                "checkpoint: only a signal will ask for one"
            )
            return
        self._requests.limit = limit
        self._display.message(f"the job's time limit is {end}: the last checkpoint begins within {limit.left_s:.0f} s")


def check_same_config(comm: Communicator, config: Config) -> None:
    """Raise UserError, on every rank, unless all have read the same. Collective."""
    texts = comm.all_gather_object(dump_config(config))
    astray = [str(rank) for rank, text in enumerate(texts) if text != texts[0]]
    if astray:
        more = f" and {len(astray) - _MOST_NAMED} more" if len(astray) > _MOST_NAMED else ""
        raise UserError(
            f"the configuration of rank {', '.join(astray[:_MOST_NAMED])}{more} is not that of rank 0: "
            "start all ranks with the same file and the same --set"
        )


def open_sinks(config: Config, run: RunDirectory, progress: Progress) -> list[Sink]:
    """The files that rank 0 logs to, going on after the step where ``progress`` stands."""
    sinks: list[Sink] = [StepLog(run.path, progress.step)]
    if config.log.tensorboard:
        from hpctrain.metrics.tensorboard import TensorBoardLog

        sinks.append(TensorBoardLog(run.tensorboard, progress.step))
    return sinks


def _has_ended(reason: str, record: Path) -> str:
    return (
        f"this run has ended ({reason}), see {record}; to train further, raise the limit that ended it "
        "(for example train.epochs)"
    )


def _announce(display: Display, session: Session, feeds: Feeds, remarks: list[str]) -> None:
    """What was chosen, and why."""
    transport = feeds.parts.exchange.transport
    display.message(f"engine {session.comm.name} ({session.engine_reason}) on {session.comm.device}")
    display.message(f"reduction {transport.name} ({transport.reason})")
    display.message(f"loader {feeds.train_loader.name} ({feeds.loader_reason})")
    for remark in remarks:
        display.message(remark)
