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
from hpctrain.topology.ranks import detect

_DEFAULT_MODEL = "resnet50"
_INTERRUPTED, _TERMINATED = 130, 143


@dataclass(frozen=True, slots=True)
class Asked:
    """What was typed beside the configuration."""

    ranks: int
    rounds: int
    json_file: Path | None
    picture: Path | None
    tune: bool


def bench_gradients_command(path: Path | None, overrides: Sequence[str], model: str | None, asked: Asked) -> None:
    """Compare whole exchanges on ``asked.ranks`` processes of this host, which the command starts itself.

    ``model`` takes the place of the net in the configuration ``path``; without either it is ResNet-50.
    """
    name = model or (None if path else _DEFAULT_MODEL)
    config = load_config(path, [*([f"model={{name: {name}}}"] if name else []), *overrides])
    topology = detect(os.environ)
    if topology.launcher != "none":
        raise UserError(
            f"bench gradients starts its own ranks, but {topology.launcher} has started {topology.world_size}: leave "
            f"{topology.launcher} out and say --ranks {topology.world_size}"
        )
    if asked.tune and asked.json_file is None:
        raise UserError("--tune writes beside the JSON file: name one with --json")
    for file in (asked.json_file, asked.picture):
        require_writable(file)
    provenance = Provenance([topology.host])
    with _ended_by_signals():
        record = _measure(config, asked)
    record |= {"provenance": provenance.to_record()}
    write_result(asked.json_file, record)
    if asked.picture is not None:
        from hpctrain.bench.gradients.picture import draw_times

        draw_times(asked.picture, record)
    print_record(record)


def _measure(config: Config, asked: Asked) -> dict[str, Any]:
    print(f"starting {len(GROUPS)} competitors with {asked.ranks} ranks each", flush=True)
    with gathered(GROUPS, asked.ranks, config) as company:
        bench = Bench(config, company)
        contests = bench.verify_all()
        print(f"verified {len(contests)} variants of {len(company.crews)} competitors", flush=True)
        samples = bench.run(contests, asked.rounds, teller(asked.rounds, True))
        record = record_of(bench, samples, asked.rounds)
        if asked.tune and asked.json_file is not None:
            print("tuning", flush=True)
            tuning = tune(bench, record["settings"]["bytes_fp32"], asked.rounds, teller(asked.rounds, True))
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
