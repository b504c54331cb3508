"""The look at an allocation before training: ``hpctrain doctor --job``, run by all ranks that will train.

It joins the job by the engine that training will use, compares the places of all ranks, and measures nodes alone
and in pairs. Mistakes end it with exit status 2, faults of a machine with 1, each told once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import TypeAdapter

from hpctrain.comm.base import Communicator
from hpctrain.config.schema import Config
from hpctrain.doctor.clocks import read_clocks
from hpctrain.doctor.judge import clock_faults, complaints, locked_twice, unshared
from hpctrain.doctor.outcome import tell
from hpctrain.doctor.place import RankPlace, own_place
from hpctrain.doctor.shared import Sight, see_run_directory
from hpctrain.doctor.speed import Pace, measure
from hpctrain.doctor.suspects import Suspect, confirm, find_suspects, sentence
from hpctrain.errors import HpctrainError, MachineError, UserError
from hpctrain.metrics.jsonfiles import to_json_value, write_json
from hpctrain.metrics.layout import PREFLIGHT_FILE
from hpctrain.topology import voice
from hpctrain.train.rundir import held_by_another
from hpctrain.train.session import open_session

SCHEMA = 1
#: how long rank 0 gives the others to be gone
_LEAVE_LAST_S = 2.0

Told = TypeVar("Told", RankPlace, Pace, Sight)


@dataclass
class Preflight:
    """All that was found, by rank: mistakes of the user (``complaints``), what is wrong with the machine (``faults``,
    and the nodes in ``suspects``), and what may stay so. ``cost_s`` is counted from the start of rank 0's process.
    """

    places: list[RankPlace]
    engine: str
    engine_reason: str
    complaints: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    paces: list[Pace] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    start_s: float = 0.0
    cost_s: float = 0.0

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        ok = not (self.complaints or self.faults or self.suspects)
        return {"schema": SCHEMA, "ok": ok, **to_json_value(asdict(self))}


def job_command(config: Config, run_dir: Path | None, json_file: Path | None) -> None:
    """Look at this job before ``config`` is trained in it. Collective over the launcher's ranks.

    Where something is to be mended, or a node is broken, or slow and launch.slow_node is stop, rank 0 tells it and
    leaves by SystemExit, with the status of a UserError or a MachineError. The others return: they leave first, so
    that the launcher, which ends all ranks after one that fails, gives on that status and not one of its own.
    """
    comm_config = config.comm.model_copy(update={"startup_timeout_s": config.comm.timeout_s})
    with open_session(comm_config, config.train.device) as session:
        rank = session.comm.rank
        found = examine_job(session.comm, config, run_dir, session.engine_reason)
        if rank == 0:
            leave_findings(found, config, run_dir, json_file)
    error = verdict(found, config)
    if error is not None and rank == 0:
        print(voice.sentence(error), file=sys.stderr, flush=True)
        time.sleep(_LEAVE_LAST_S if len(found.places) > 1 else 0)
        raise SystemExit(error.exit_code)


def verdict(found: Preflight, config: Config) -> HpctrainError | None:
    """What keeps ``config`` from being trained here, if anything."""
    if found.complaints:
        return UserError("\n".join([*found.complaints, *found.faults]))
    if found.faults:
        return MachineError("\n".join(found.faults))
    if any(suspect.broken or config.launch.slow_node == "stop" for suspect in found.suspects):
        return MachineError(sentence(found.suspects))
    return None


def examine_job(comm: Communicator, config: Config, run_dir: Path | None, engine_reason: str) -> Preflight:
    """Everything that ``doctor --job`` looks at; what costs most only where the places are sound. Collective."""
    start_s = _age_s()
    first_host = comm.broadcast_object(comm.topology.host)
    places = _of_all(comm, own_place(comm.topology, comm.device, first_host, config.data.threads))
    found = Preflight(places, comm.name, engine_reason, start_s=start_s)
    found.complaints += complaints(places, config.train.device)
    found.faults += clock_faults(places, read_clocks(comm))
    if run_dir is not None:
        try:
            sights = _of_all(comm, see_run_directory(comm, run_dir, first_host))
            found.complaints += unshared(places, [sight.reads for sight in sights], str(run_dir))
            found.remarks += locked_twice(places, [sight.locks for sight in sights], str(run_dir))
        except UserError as error:
            found.complaints.append(str(error))
    if not (found.complaints or found.faults):
        _find_suspects(comm, found)
    found.cost_s = comm.broadcast_object(_age_s())
    return found


def _find_suspects(comm: Communicator, found: Preflight) -> None:
    """Measure, and once more where somebody looks slow."""
    try:
        ring = list(dict.fromkeys(place.host for place in found.places))
        found.paces = _measure_all(comm, found.places, ring)
    except UserError as error:
        found.remarks.append(f"nodes were not measured: {error}")
        return
    found.suspects = find_suspects(found.places, found.paces, comm.device.type)
    if found.suspects:
        # With other neighbours, so that a sound node between two slow ones is not taken for a third.
        again = _measure_all(comm, found.places, [*ring[::2], *ring[1::2]])
        found.suspects = confirm(found.suspects, find_suspects(found.places, again, comm.device.type))


def _measure_all(comm: Communicator, places: Sequence[RankPlace], ring: Sequence[str]) -> list[Pace]:
    return _of_all(comm, measure(comm, [place.host for place in places], ring))


def _of_all(comm: Communicator, mine: Told) -> list[Told]:
    """What each rank has to tell, a dataclass, in rank order. Collective."""
    one = TypeAdapter(type(mine))
    return [one.validate_python(told) for told in comm.all_gather_object(asdict(mine))]


def leave_findings(found: Preflight, config: Config, run_dir: Path | None, json_file: Path | None) -> None:
    """Tell ``found`` (see ``outcome.tell``), and leave it in the run directory too if no other job trains there.

    Rank 0 alone.
    """
    from hpctrain.doctor.job_table import render

    record = found.to_record()
    tell(record, lambda: render(found, warn=config.launch.slow_node == "warn"), json_file)
    if run_dir is not None and run_dir.is_dir() and not held_by_another(run_dir):
        write_json(run_dir / PREFLIGHT_FILE, record)


def _age_s() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()
