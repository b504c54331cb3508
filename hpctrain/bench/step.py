"""`hpctrain bench step`: what the framework adds to a training step, and how it compares with Horovod's optimizer.

It times whole steps on synthetic pictures; loaders, evaluation and checkpoints are not in it. Before anything is
timed, the variants must have moved the same weights to the same place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hpctrain.bench import variants as loops
from hpctrain.bench.blocks import WARMUP_STEPS, Sample, run_rounds
from hpctrain.bench.report import SCHEMA, compare, describe_variants, sentence
from hpctrain.bench.variants import Variant
from hpctrain.bench.verify import TOLERANCE, VERIFIED_STEPS, verify
from hpctrain.comm.horovod_engine import HorovodCommunicator
from hpctrain.config.load import config_hash
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.metrics.provenance import Provenance
from hpctrain.train.build import build_parts, open_data, plan_for
from hpctrain.train.loop import Loop
from hpctrain.train.parts import Parts
from hpctrain.train.session import Session
from hpctrain.train.step import seed_micro_batch

#: Laid over every configuration: no files are read, no epoch ends the run, and a small rate that never changes
#: keeps the loss finite on pictures that teach nothing.
FIXED = ("data.loader=synthetic", "train.epochs=1000000", "schedule={kind: constant, lr: 0.001}")


def _refuse(config: Config) -> None:
    """Raise UserError for what the loops by hand do not do."""
    if config.train.accumulation > 1:
        raise UserError("bench step compares steps of one micro-batch: set train.accumulation=1")
    if config.train.ema_decay:
        raise UserError("bench step compares with loops that keep no moving average: set train.ema_decay=none")


def measure(
    config: Config, session: Session, folder: Path, rounds: int, on_round: Callable[[int], None], mpi_is_held: bool
) -> dict[str, Any]:
    """Build the variants, verify them, time them in ``rounds`` rounds; on rank 0 the JSON record. Collective.

    ``config`` has ``FIXED`` laid over it; our loop logs into ``folder``. Over MPI, Horovod's own optimizer takes part
    only where MPI was started before the session was opened: ``mpi_is_held``. Raises UserError for a configuration
    that the loops by hand cannot follow, MachineError when they end at other weights.
    """
    _refuse(config)
    comm = session.comm
    provenance = Provenance.of_job(comm)
    dataset = open_data(comm, config)
    parts = build_parts(config, plan_for(config, dataset, comm.topology), session)
    loop = loops.make_loop(parts, dataset, session, folder)
    variants, unavailable = _variants(loop, loops.ready_batches(parts, dataset, session), mpi_is_held)
    differences = verify(variants, comm, config.train.precision, _same_randomness(parts))
    samples = run_rounds(
        variants,
        comm,
        rounds=rounds,
        steps=config.log.every_steps,
        seed=config.seed,
        tick=_ticker(session),
        on_round=on_round,
    )
    loop.journal.close()
    parts.exchange.close()
    record = _record(loop, variants, samples, rounds) | {
        "verified": {"steps": VERIFIED_STEPS, "tolerance": TOLERANCE[config.train.precision], "apart": differences},
        "unavailable": unavailable,
        "sentence": sentence(compare(samples), unavailable),
        "engine_choice": session.engine_reason,
    }
    if provenance is not None:
        record["provenance"] = provenance.to_record()
    return record


def _variants(loop: Loop, batches: Sequence[loops.Ready], mpi_is_held: bool) -> tuple[list[Variant], dict[str, str]]:
    """Those that can run in this job, ours first, and why another cannot."""
    parts, comm = loop.parts, loop.parts.comm
    variants = [loops.ours(loop), loops.bare(parts, batches)]
    if comm.world_size > 1:
        variants.append(loops.bare_local(parts, batches))
    if not isinstance(comm, HorovodCommunicator):
        return variants, {"horovod": f"the engine of this job is {comm.name}"}
    if comm.versions()["horovod_controller"] == "mpi" and not mpi_is_held:
        return variants, {"horovod": "over MPI it restarts only where mpi4py is installed"}
    return [*variants, loops.horovod(parts, comm, batches)], {}


def _same_randomness(parts: Parts) -> Callable[[int], None]:
    return lambda step: seed_micro_batch(parts.config.seed, step, parts.comm.rank)


def _ticker(session: Session) -> Callable[[], None]:
    """Tells the watch that this rank is alive, in loops that tell it nothing themselves."""
    steps = itertools.count(1)
    return lambda: session.watch.beat(next(steps), "forward")


def _record(loop: Loop, variants: Sequence[Variant], samples: dict[str, list[Sample]], rounds: int) -> dict[str, Any]:
    """What was measured and how. Collective."""
    parts, comm = loop.parts, loop.parts.comm
    config = parts.config
    return {
        "schema": SCHEMA,
        "what": "bench step",
        "config_hash": config_hash(config),
        "config": config.model_dump(mode="json", include={"model", "train", "optimizer", "gradients"})
        | {"data.image_size": config.data.image_size, "fixed": FIXED},
        "plan": parts.plan.to_record(),
        "engine": {"name": comm.name, "versions": comm.versions()},
        "device": str(comm.device),
        "torch_threads": torch.get_num_threads(),
        "protocol": {
            "rounds": rounds,
            "steps_per_block": config.log.every_steps,
            "warmup_steps_per_block": WARMUP_STEPS,
            "rule": "each round runs one block of each variant, in random order; ratios are taken within rounds",
        },
        "variants": describe_variants(variants, samples, parts.plan.batch_global),
        "ratios": compare(samples),
        "phases_s": parts.clock.summary().phases_s,
        "memory": {"ranks": comm.all_gather_object(loop.journal.system.to_record())},
    }
