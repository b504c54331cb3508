"""The commands `train` and `eval`, from what was typed to the closing words."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.config.load import dump_config, load_config
from hpctrain.config.schema import Config, ParallelConfig
from hpctrain.errors import UserError
from hpctrain.metrics.jsonfiles import write_atomic
from hpctrain.metrics.progress import make_display
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.steplog import StepLog
from hpctrain.topology.ranks import Topology, detect
from hpctrain.train.build import build_feeds, build_parts, open_data, plan_for
from hpctrain.train.journal import Journal, Sink
from hpctrain.train.loop import Loop
from hpctrain.train.resume import check_model, choose_checkpoint, find_checkpoint, load_together, restore
from hpctrain.train.rundir import RunDirectory, default_run_dir
from hpctrain.train.session import Session, open_session
from hpctrain.train.state import Evaluation, Progress
from hpctrain.train.summary import finish


def train_command(config: Config, name: str, *, resume: str, run_dir: Path | None) -> None:
    """Train on all ranks of this job, from the configuration called ``name`` to ``record.json``."""
    with open_session(config.comm, config.train.device) as session:
        path = on_rank_zero(session.comm, lambda: str(run_dir or default_run_dir(name)))
        run = RunDirectory(Path(path))
        on_rank_zero(session.comm, run.open)
        try:
            train(config, session, run, resume, title=name)
        finally:
            run.close()


def train(config: Config, session: Session, run: RunDirectory, resume: str, title: str) -> None:
    """One run: data, plan, parts, checkpoint to go on from, loop, record. Collective."""
    comm = session.comm
    check_same_config(comm, config)
    provenance = Provenance(sorted(set(comm.all_gather_object(comm.topology.host))))
    dataset = open_data(comm, config)
    plan = plan_for(config, dataset, comm.topology)
    parts = build_parts(config, plan, session)
    passed_over: list[str] = []
    checkpoint = choose_checkpoint(comm, run.checkpoints, resume, passed_over.append)
    progress = Progress() if checkpoint is None else restore(parts, checkpoint)
    on_rank_zero(comm, lambda: _write_config(run, config))
    feeds = build_feeds(parts, dataset, session, progress)
    display = make_display(comm.rank == 0, epochs=plan.epochs, total_steps=plan.total_steps, first_step=progress.step)
    journal = Journal(parts, feeds, display, open_sinks(config, run, progress) if comm.rank == 0 else [])
    try:
        display.start(f"{title} in {run.path}", plan.describe())
        display.message(f"engine {comm.name} ({session.engine_reason}) on {comm.device}")
        transport = parts.exchange.transport
        display.message(f"reduction {transport.name} ({transport.reason})")
        display.message(f"loader {feeds.train_loader.name} ({feeds.loader_reason})")
        for line in passed_over:
            display.message(line)
        if checkpoint is not None:
            display.message(f"going on from step {progress.step}")
        loop = Loop(parts, progress, feeds.train_batches(progress), feeds.evaluate, journal, run, progress.step)
        reason = loop.reason_to_stop()
        if reason is not None and on_rank_zero(comm, run.record.exists):
            display.message(f"this run has ended ({reason}), see {run.record}; to go on, change what ended it")
            return
        on_rank_zero(comm, run.forget_record)
        reason = loop.train()
        loop.save()
        notes = {"ended": reason, "engine_choice": session.engine_reason}
        display.finish(finish(loop, feeds, provenance, notes, title))
    finally:
        journal.close()
        feeds.close()
        parts.exchange.close()


def check_same_config(comm: Communicator, config: Config) -> None:
    """Raise UserError, on every rank, unless all have read the same. Collective."""
    texts = comm.all_gather_object(dump_config(config))
    astray = [str(rank) for rank, text in enumerate(texts) if text != texts[0]]
    if astray:
        raise UserError(
            f"the configuration of rank {', '.join(astray[:8])} is not that of rank 0: "
            "start all ranks with the same file and the same --set"
        )


def _write_config(run: RunDirectory, config: Config) -> None:
    write_atomic(run.config, dump_config(config).encode())


def open_sinks(config: Config, run: RunDirectory, progress: Progress) -> list[Sink]:
    """The files that rank 0 logs to, going on after the step where ``progress`` stands."""
    sinks: list[Sink] = [StepLog(run.path, progress.step)]
    if config.log.tensorboard:
        from hpctrain.metrics.tensorboard import TensorBoardLog

        sinks.append(TensorBoardLog(run.tensorboard, progress.step))
    return sinks


def eval_command(path: Path, overrides: list[str], json_file: Path | None) -> None:
    """Evaluate a checkpoint as its run would have, and print the figures on rank 0."""
    folder = find_checkpoint(path).absolute()
    config_file = folder.parent.parent / "config.yaml"
    config = load_config(config_file, overrides)
    with open_session(config.comm, config.train.device) as session:
        result = evaluate_checkpoint(config, session, folder)
        if session.comm.rank == 0:
            figures = asdict(result) | {"checkpoint": str(folder)}
            print(f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  loss {result.loss:.4f}  on {result.seen} samples")
            if json_file is not None:
                write_atomic(json_file, json.dumps(figures, indent=2).encode() + b"\n")


def evaluate_checkpoint(config: Config, session: Session, folder: Path) -> Evaluation:
    """Exact figures of one checkpoint's model, or of its moving average where it has one. Collective.

    On any number of ranks: the plan is that of one, since a judgement has no global batch that could be too large.
    """
    comm = session.comm
    dataset = open_data(comm, config)
    plan = plan_for(config.model_copy(update={"parallel": ParallelConfig()}), dataset, Topology())
    parts = build_parts(config, plan, session)
    checkpoint = load_together(comm, folder)
    check_model(checkpoint, dict(parts.model.state_dict()), config.model.name)
    parts.model.load_state_dict(checkpoint.tensors["model"])
    if parts.ema is not None:
        parts.ema.load_state_dict(checkpoint.tensors["ema"])
    feeds = build_feeds(parts, dataset, session, Progress())
    try:
        return feeds.evaluate()
    finally:
        feeds.close()
        parts.exchange.close()


def print_plan(config: Config) -> None:
    """Print what `train` would do on the ranks of this job, without starting an engine or a step."""
    from rich.console import Console
    from rich.table import Table

    topology = detect(os.environ)
    if topology.rank:
        return
    alone = SerialCommunicator(replace(topology, rank=0, world_size=1), torch.device("cpu"))
    dataset = open_data(alone, config)
    plan = plan_for(config, dataset, topology)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in plan.describe():
        table.add_row(name, value)
    Console(highlight=False).print(table)
