"""The commands `train` and `eval`, from what was typed to the closing words."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.config.load import load_config
from hpctrain.config.schema import Config, ParallelConfig
from hpctrain.launch.continuing import TrainCommand
from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.preempt import Requests
from hpctrain.metrics.jsonfiles import write_json
from hpctrain.topology.ranks import Topology, detect
from hpctrain.train.build import build_feeds, build_parts, open_data, plan_for
from hpctrain.train.resume import check_model, find_checkpoint, load_together
from hpctrain.train.run import check_same_config, train
from hpctrain.train.rundir import RunDirectory, default_run_dir
from hpctrain.train.session import Session, open_session
from hpctrain.train.state import Evaluation

#: what Slurm leaves the ranks of a job that it ends, between SIGTERM and SIGKILL, as it comes
KILL_WAIT_S = 30.0


def train_command(
    config: Config, command: TrainCommand, *, resume: str, run_dir: Path | None, requests: Requests | None = None
) -> None:
    """Train on all ranks of this job, from the configuration that ``command`` names to ``record.json``.

    Where ``requests`` ask for an end before that, every rank leaves by SystemExit with the status ``PREEMPTED``, its
    checkpoint written.
    """
    requests = requests or Requests()
    with open_session(config.comm, config.train.device, requests.asked) as session:
        is_main = session.comm.rank == 0
        path = on_rank_zero(session.comm, lambda: str(run_dir or default_run_dir(command.title)))
        run = open_run(session.comm, Path(path), config.comm.timeout_s + KILL_WAIT_S)
        try:
            show_end = train(config, session, run, resume, command, requests)
        finally:
            run.close()
    if show_end is None:
        raise SystemExit(PREEMPTED)
    if is_main:
        show_end()


def open_run(comm: Communicator, path: Path, earlier_start_s: float) -> RunDirectory:
    """The run directory ``path``, locked by rank 0. Collective."""
    run = RunDirectory(path)
    while not on_rank_zero(comm, lambda: run.open(earlier_start_s)):
        pass  # Each asking is a sign of life of all ranks, however long an earlier start of this job is waited for.
    return run


def eval_command(path: Path, overrides: list[str], json_file: Path | None) -> None:
    """Evaluate a checkpoint as its run would have, and print the figures on rank 0."""
    folder = find_checkpoint(path).absolute()
    config = load_config(RunDirectory(folder.parent.parent).config, overrides)
    with open_session(config.comm, config.train.device) as session:
        check_same_config(session.comm, config)
        # Of a run that goes on, another rank may have found a newer one.
        folder = Path(session.comm.broadcast_object(str(folder)))
        result = evaluate_checkpoint(config, session, folder)
        if session.comm.rank == 0:
            figures = asdict(result) | {"checkpoint": str(folder)}
            print(f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  loss {result.loss:.4f}  on {result.seen} samples")
            if json_file is not None:
                write_json(json_file, figures)


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
    feeds = build_feeds(parts, dataset, session)
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
