"""The command `bench comm`, from what was typed to the tables on the screen and the JSON file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hpctrain.bench.comm.measure import BLOCK_S, MAX_RUNS, WARMUP_RUNS, Bench, cells_of, run
from hpctrain.bench.comm.operations import SUMMED_DTYPES, all_cases
from hpctrain.bench.comm.report import describe_cases, describe_fits, print_tables, sentence
from hpctrain.bench.comm.sizes import ladder
from hpctrain.bench.command import require_writable, teller, write_result
from hpctrain.comm.agree import on_rank_zero
from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.metrics.provenance import Provenance
from hpctrain.topology.ranks import detect
from hpctrain.train.run import check_same_config
from hpctrain.train.session import Session, open_session

SCHEMA = 1
#: Every configuration names a model; none takes part here.
_WITHOUT_FILE = ("model.name=dense",)


def bench_comm_command(
    path: Path | None,
    overrides: Sequence[str],
    *,
    smallest: str,
    largest: str,
    dtypes: Sequence[str],
    rounds: int,
    json_file: Path | None,
) -> None:
    """Measure the engine's operations on all ranks of this job; rank 0 prints the outcome and writes ``json_file``.

    ``path`` is a configuration whose `comm`, `train.device` and `seed` count; None stands for the defaults.
    """
    config = load_config(path, overrides if path else [*_WITHOUT_FILE, *overrides])
    sizes = ladder(smallest, largest)
    _require_dtypes(dtypes)
    require_writable(json_file)
    if detect(os.environ).world_size == 1:
        raise UserError(
            "bench comm measures what passes between ranks, and this job has one: start it with horovodrun -np 2, "
            "mpirun -np 2 or torchrun --no-python --nproc-per-node 2"
        )
    with open_session(config.comm, config.train.device) as session:
        check_same_config(session.comm, config)
        is_main = session.comm.rank == 0
        record = measure(config, session, sizes, dtypes, rounds, teller(rounds, is_main))
        on_rank_zero(session.comm, lambda: write_result(json_file, record))
        if is_main:
            print_tables(record)


def measure(
    config: Config,
    session: Session,
    sizes: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    on_round: Callable[[int], None],
) -> dict[str, Any]:
    """Verify and time everything at ``sizes`` (bytes) in ``rounds`` rounds; on rank 0 the JSON record. Collective.

    Raises MachineError for a wrong result, UserError where memory is too small.
    """
    comm = session.comm
    provenance = Provenance.of_job(comm)
    cells = cells_of(all_cases(dtypes), sizes, comm.world_size)
    steps = itertools.count(1)
    bench = Bench(
        comm, max(cell.size_bytes for cell in cells), tick=lambda: session.watch.beat(next(steps), "exchange")
    )
    samples, refused = run(bench, cells, rounds=rounds, seed=config.seed, on_round=on_round)
    hosts = comm.topology.num_nodes
    record = {
        "schema": SCHEMA,
        "what": "bench comm",
        "engine": {"name": comm.name, "versions": comm.versions()},
        "engine_choice": session.engine_reason,
        "device": str(comm.device),
        "world_size": comm.world_size,
        "hosts": hosts,
        "torch_threads": torch.get_num_threads(),
        "protocol": _protocol(rounds),
        "cases": describe_cases(samples, comm.world_size),
        "fit": describe_fits(samples, world_size=comm.world_size, hosts=hosts, engine=comm.name),
        "unavailable": {str(case): reason for case, reason in refused.items()},
    }
    if provenance is not None:
        record["provenance"] = provenance.to_record()
        record["sentence"] = sentence(record)
    return record


def _protocol(rounds: int) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "warmup_runs_per_block": WARMUP_RUNS,
        "block_s": BLOCK_S,
        "most_runs_per_block": MAX_RUNS,
        "rule": "each round runs one block of each case at each size, in random order; before a block is timed its "
        "result is compared with the exact one; its time is that of the slowest rank",
        "bus_bandwidth": "size / time * bus_factor, as in NVIDIA nccl-tests, doc/PERFORMANCE.md",
    }


def _require_dtypes(dtypes: Sequence[str]) -> None:
    if unknown := [dtype for dtype in dtypes if dtype not in SUMMED_DTYPES]:
        raise UserError(f"--dtype {unknown[0]} is not known: choose one of {', '.join(SUMMED_DTYPES)}")
