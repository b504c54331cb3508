"""One run, from its data set to its record, or to the checkpoint that a later launch goes on from."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.comm.turns import Stopped, Turns
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
from hpctrain.topology.voice import listed
from hpctrain.train.build import Feeds, build_feeds, build_parts, open_data, plan_for
from hpctrain.train.journal import Journal, Sink
from hpctrain.train.launches import Launches
from hpctrain.train.loop import Loop, reason_to_stop
from hpctrain.train.parts import Parts
from hpctrain.train.resume import choose_checkpoint, restore
from hpctrain.train.rundir import RunDirectory
from hpctrain.train.samples import SampleLog
from hpctrain.train.saver import Saver
from hpctrain.train.session import Session
from hpctrain.train.state import Progress
from hpctrain.train.summary import finish, show_end

_MOST_NAMED = 8


def train(
    config: Config, session: Session, run: RunDirectory, resume: str, command: TrainCommand, requests: Requests
) -> Callable[[], None] | None:
    """Train until the run is finished, or until ``requests`` end this launch before that (None). Collective.

    Either way the last checkpoint is written when this returns. After an error one may still be under way: then the
    run directory stays locked until this process ends.

    Returns what shows the closing words, for rank 0 to call when the other ranks need not wait for it.
    """
    comm = session.comm
    check_same_config(comm, config)
    provenance = Provenance.of_job(comm)
    dataset = open_data(comm, config)
    parts = build_parts(config, plan_for(config, dataset, comm.topology), session)
    progress, remarks = _take_up(parts, run, resume)
    feeds = build_feeds(parts, dataset, session)
    journal = _open_journal(feeds, run, progress)
    display = journal.display
    try:
        display.start(f"{command.title} in {run.path}", parts.plan.describe())
        _announce(display, session, feeds, remarks)
        ended = reason_to_stop(parts.plan, progress, config.train)
        if ended is not None and on_rank_zero(comm, run.record.exists):
            return partial(display.message, _has_ended(ended, run.record))
        number, loop = _begin_launch(feeds, journal, run, progress, session.turns)
        reason, preempted = _train_and_save(loop, run, number, requests)
        if preempted:
            _tell_stop(display, reason, progress.step, command.to_continue(run.path))
            return None
        notes = {"ended": reason, "engine_choice": session.engine_reason}
        return partial(show_end, run, display, finish(loop, feeds, run, provenance, notes), command.title)
    finally:
        journal.close()
        feeds.close()
        parts.exchange.close()


def _take_up(parts: Parts, run: RunDirectory, resume: str) -> tuple[Progress, list[str]]:
    """Where the run stands, its parts restored to that, and remarks on it; keeps the configuration. Collective."""
    remarks: list[str] = []
    progress = Progress()
    checkpoint = choose_checkpoint(parts.comm, run.checkpoints, resume, remarks.append)
    if checkpoint is not None:
        progress = restore(parts, checkpoint)
        remarks.append(f"going on from step {progress.step}")
    on_rank_zero(parts.comm, lambda: write_atomic(run.config, dump_config(parts.config).encode()))
    return progress, remarks


def _open_journal(feeds: Feeds, run: RunDirectory, progress: Progress) -> Journal:
    """The display and the files that tell of the run, from where ``progress`` stands on. Collective."""
    parts, plan = feeds.parts, feeds.parts.plan
    is_main = parts.comm.rank == 0
    display = make_display(is_main, epochs=plan.epochs, total_steps=plan.total_steps, first_step=progress.step)
    sinks = open_sinks(parts.config, run, progress) if is_main else []
    return Journal(parts, feeds, display, sinks, run.path)


def _begin_launch(
    feeds: Feeds, journal: Journal, run: RunDirectory, progress: Progress, turns: Turns
) -> tuple[int, Loop]:
    """Note that training goes on; the launch's number, and its loop. Collective."""
    parts, plan, comm = feeds.parts, feeds.parts.plan, feeds.parts.comm
    on_rank_zero(comm, run.forget_record)
    begin = partial(Launches(run.path).begin, progress.step, plan.world_size, plan.train_samples)
    number: int = on_rank_zero(comm, begin)
    samples, batches = None, feeds.train_batches(progress)
    if parts.config.data.log_samples:
        samples = SampleLog(run.path, comm.rank, number)
        batches = samples.noting(batches, progress.step, plan.accumulation)
    saver = Saver(parts, run.checkpoints, progress.step, samples)
    return number, Loop(parts, progress, batches, feeds.evaluate, journal, saver, turns)


def _train_and_save(loop: Loop, run: RunDirectory, number: int, requests: Requests) -> tuple[str, bool]:
    """Train, save and note the end; why launch ``number`` ended, and whether that was before the run's. Collective."""
    comm, saver = loop.parts.comm, loop.saver
    try:
        if comm.rank == 0:
            _respect_time_limit(loop, run, requests)
        try:
            reason, preempted = loop.train(), False
        except Stopped as stopped:
            requests.agreed()
            reason, preempted = stopped.reason, True
        loop.save()
        saver.wait()
        step, write_s = loop.progress.step, max(saver.writes_s, default=0.0)
        end = partial(Launches(run.path).end, number, step, reason, preempted=preempted, write_s=write_s)
        on_rank_zero(comm, end)
        return reason, preempted
    finally:
        if not saver.close():
            run.keep_locked()


def _respect_time_limit(loop: Loop, run: RunDirectory, requests: Requests) -> None:
    """Let the end of the job's time ask for the last checkpoint, where that leaves time to train."""
    end_s = job_end_s(os.environ)
    if end_s is None:
        return
    saver, turns, margin_s = loop.saver, loop.turns, loop.parts.config.launch.margin_s
    earlier_s = max((launch.write_s for launch in read_launches(run.path)), default=0.0)
    limit = TimeLimit(end_s, margin_s, lambda: max([earlier_s, *saver.writes_s]), lambda: turns.turn_s)
    end, display = f"{datetime.fromtimestamp(end_s):%Y-%m-%d %H:%M:%S}", loop.journal.display
    if limit.left_s <= 0:
        display.message(
            f"the job's time limit, {end}, is closer than launch.margin_s = {margin_s:g} s allows for a last "
            "checkpoint: only a signal will ask for one"
        )
        return
    requests.limit = limit
    display.message(f"the job's time limit is {end}: the last checkpoint begins within {limit.left_s:.0f} s")


def _tell_stop(display: Display, reason: str, step: int, to_continue: str) -> None:
    where = f"after step {step}, its checkpoint is written" if step else "before the first step"
    display.message(f"stopped by {reason}, {where} (exit status {PREEMPTED})")
    display.message(to_continue)


def check_same_config(comm: Communicator, config: Config) -> None:
    """Raise UserError, on every rank, unless all have read the same. Collective."""
    rows = comm.all_gather_object([comm.topology.host, dump_config(config)])
    host, expected = rows[0]
    astray = [f"{rank} ({place})" for rank, (place, text) in enumerate(rows) if text != expected]
    if astray:
        raise UserError(
            f"the configuration of rank {listed(astray, _MOST_NAMED)} is not that of rank 0 ({host}): "
            "start all ranks with the same file, as their hosts see it, and the same --set"
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
