"""The command `bench gradients`, from what was typed to the table, the JSON file and the picture."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hpctrain.bench.command import require_writable, teller, write_result
from hpctrain.bench.gradients.company import gathered
from hpctrain.bench.gradients.groups import GROUPS
from hpctrain.bench.gradients.measure import Bench
from hpctrain.bench.gradients.report import print_record, record_of
from hpctrain.bench.gradients.tuning import tune, tuning_sentence, write_fragment
from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.metrics.provenance import Provenance
from hpctrain.topology.ranks import Topology, detect

_DEFAULT_MODEL, _DEFAULT_RANKS = "resnet50", 2
_INTERRUPTED, _TERMINATED = 130, 143


@dataclass(frozen=True, slots=True)
class Asked:
    """What was typed beside the configuration; ``ranks`` None is as many as a launcher has started, else two."""

    ranks: int | None
    rounds: int
    json_file: Path | None
    picture: Path | None
    tune: bool


def bench_gradients_command(path: Path | None, overrides: Sequence[str], model: str | None, asked: Asked) -> None:
    """Compare whole exchanges on processes of this host, which the command starts itself.

    Under a launcher the first of its ranks does that, and the others have nothing to do. ``model`` takes the place of
    the net in the configuration ``path``; without either it is ResNet-50.
    """
    name = model or (None if path else _DEFAULT_MODEL)
    config = load_config(path, [*([f"model={{name: {name}}}"] if name else []), *overrides])
    topology = detect(os.environ)
    ranks = count_ranks(asked.ranks, topology)
    if topology.rank > 0:
        return
    if asked.tune and asked.json_file is None:
        raise UserError("--tune writes beside the JSON file: name one with --json")
    for file in (asked.json_file, asked.picture):
        require_writable(file)
    if topology.launcher != "none":
        # The launcher may have bound this rank to a core; the competitors' ranks are bound to none.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    provenance = Provenance([topology.host])
    with _ended_by_signals():
        record = _measure(config, asked, ranks)
    record |= {"provenance": provenance.to_record()}
    write_result(asked.json_file, record)
    if asked.picture is not None:
        from hpctrain.bench.gradients.picture import draw_times

        draw_times(asked.picture, record)
    print_record(record)


def count_ranks(asked: int | None, topology: Topology) -> int:
    """How many ranks a competitor has. UserError where a launcher has started another number, or on several hosts."""
    if topology.launcher == "none":
        return asked or _DEFAULT_RANKS
    if topology.local_size != topology.world_size:
        raise UserError(
            f"bench gradients measures one host, but {topology.launcher} has started {topology.local_size} of "
            f"{topology.world_size} ranks here: start it by itself with --ranks {topology.local_size}"
        )
    if asked not in (None, topology.world_size):
        raise UserError(
            f"--ranks is {asked}, but {topology.launcher} has started {topology.world_size}: leave one of them out"
        )
    return topology.world_size


def _measure(config: Config, asked: Asked, ranks: int) -> dict[str, Any]:
    print(f"starting {len(GROUPS)} competitors with {ranks} ranks each", flush=True)
    with gathered(GROUPS, ranks, config) as company:
        bench = Bench(config, company)
        contests = bench.verify_all()
        print(f"verified {len(contests)} variants of {len(company.crews)} competitors", flush=True)
        samples = bench.run(contests, asked.rounds, teller(asked.rounds, True))
        record = record_of(bench, samples, asked.rounds)
        if asked.tune and asked.json_file is not None:
            print("tuning", flush=True)
            tuning = tune(bench, record["settings"]["bytes_fp32"], asked.rounds, teller(2 * asked.rounds, True))
            fragment = asked.json_file.with_name(f"{asked.json_file.stem}_tuned.yaml")
            write_fragment(fragment, tuning, record["settings"])
            told = tuning_sentence(tuning, fragment)
            record |= {"tuning": tuning | {"file": fragment.name, "sentence": told}}
            record["sentence"] += f" Tuned: {told}."
    return record


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Asked to stop, leave by an exception, so that the ranks are ended first."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
