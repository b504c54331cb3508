"""The commands `bench step` and `bench data`, from what was typed to the table on the screen and the JSON file."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hpctrain.bench import data, step
from hpctrain.bench.report import print_outcome, rate_cells, step_cells
from hpctrain.comm import mpi_engine
from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.metrics.jsonfiles import write_json
from hpctrain.metrics.provenance import Provenance
from hpctrain.topology.ranks import Topology, detect
from hpctrain.train.build import open_data
from hpctrain.train.session import open_session

_MPI_LAUNCHERS = ("mpirun", "mpiexec", "srun")


def bench_step_command(path: Path, overrides: Sequence[str], rounds: int, json_file: Path | None) -> None:
    """Compare training steps on all ranks of this job; rank 0 prints the outcome and writes it to ``json_file``."""
    config = load_config(path, [*overrides, *step.FIXED])
    require_writable(json_file)
    mpi_is_held = _hold_mpi(config, detect(os.environ))
    with open_session(config.comm, config.train.device) as session, tempfile.TemporaryDirectory() as folder:
        is_main = session.comm.rank == 0
        record = step.measure(config, session, Path(folder), rounds, teller(rounds, is_main), mpi_is_held)
        on_rank_zero(session.comm, lambda: write_result(json_file, record))
        if is_main:
            print_outcome(record, step_cells)


def bench_data_command(path: Path, overrides: Sequence[str], rounds: int, json_file: Path | None) -> None:
    """Compare loaders in this one process, print the outcome and write it to ``json_file``."""
    config = load_config(path, overrides)
    require_writable(json_file)
    topology = detect(os.environ)
    if topology.world_size > 1:
        raise UserError(f"bench data measures one process, but {topology.launcher} started more: leave it out")
    provenance = Provenance([topology.host])
    cores = len(os.sched_getaffinity(0))
    task = data.Task(
        config=config.data,
        index=open_data(SerialCommunicator(topology, torch.device("cpu")), config).train,
        seed=config.seed,
        batch_size=config.train.batch_per_worker,
        threads=config.data.threads or cores,
        batches=config.log.every_steps,
    )
    record = data.measure(task, rounds, teller(rounds, True), {})
    record |= {"sentence": data.sentence(record), "provenance": provenance.to_record()}
    write_result(json_file, record)
    print_outcome(record, rate_cells)


def require_writable(json_file: Path | None) -> None:
    """Raise UserError for a result that could not be kept, before it costs minutes."""
    if json_file is None:
        return
    folder = json_file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"the folder of {json_file} does not exist: make it, or name another file")
    if json_file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{json_file} cannot be written: name another file")


def _hold_mpi(config: Config, topology: Topology) -> bool:
    """Start MPI before Horovod does, so that Horovod can be restarted; whether that was possible."""
    wanted = config.comm.engine in ("auto", "horovod") and topology.launcher in _MPI_LAUNCHERS
    if not wanted or not mpi_engine.probe().ok:
        return False
    mpi_engine.start_mpi()
    return True


def teller(rounds: int, is_main: bool) -> Callable[[int], None]:
    """Tells after the first round how long the others will take."""
    started_s = time.monotonic()

    def tell(done: int) -> None:
        if is_main and done == 1 < rounds:
            left_s = (time.monotonic() - started_s) * (rounds - 1)
            print(f"1 of {rounds} rounds is done, the others take about {left_s / 60:.1f} minutes", flush=True)

    return tell


def write_result(json_file: Path | None, record: Mapping[str, Any]) -> None:
    if json_file is not None:
        write_json(json_file, record)
