"""The finished runs that a scaling report is made of, read from their folders: `record.json` and `config.yaml`.

Nothing else of a run is looked at, and whether runs compare is for ``comparable`` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.metrics.layout import CONFIG_FILE, RECORD_FILE
from hpctrain.metrics.record import Record, read_record
from hpctrain.topology.voice import listed

_MOST_NAMED = 8


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """How large a run was: workers (GPUs, one each) in all, on how many nodes."""

    workers: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run. ``rate`` is the median of its images/s after warm-up, over the steps of its last launch."""

    path: Path
    record: Record
    config: Config
    rate: float

    @property
    def size(self) -> Size:
        return Size(self.record.plan.workers, self.record.plan.nodes)

    @property
    def batch_global(self) -> int:
        """Samples of one optimizer step."""
        return self.record.plan.batch_global

    @property
    def batch(self) -> tuple[int, int]:
        """What one worker takes: samples of a forward pass, and such passes in a step."""
        return self.record.plan.batch_per_worker, self.config.train.accumulation

    @property
    def steps_measured(self) -> int | None:
        """How many steps its rate is made of; None where its record does not tell."""
        return (self.record.throughput.model_extra or {}).get("steps_measured")

    @property
    def restarts(self) -> int:
        """How often it was taken up again, each time by a launch that measures its own steps alone."""
        launch: dict[str, int] = (self.record.model_extra or {}).get("launch") or {}
        return launch.get("restarts", 0)


def read_runs(paths: Sequence[Path], skip_unfinished: bool = False) -> tuple[list[Run], list[Path]]:
    """The finished runs in ``paths`` by size, batch and path, each once; and those that have not ended.

    Each path is a run directory or a folder of some. Raises UserError when there is no such folder, none holds a run or
    a run measured nothing; and when one has not ended, unless ``skip_unfinished`` and there are others.
    """
    folders = sorted({found.resolve(): found for path in paths for found in _folders(path, skip_unfinished)}.values())
    unfinished = [folder for folder in folders if not (folder / RECORD_FILE).is_file()]
    if unfinished and (not skip_unfinished or unfinished == folders):
        have = "has" if len(unfinished) == 1 else "have"
        raise UserError(
            f"{listed(unfinished, _MOST_NAMED)} {have} no {RECORD_FILE}, so the training "
            "there has not ended: resume it, or leave such runs out with --skip-unfinished"
        )
    finished = [_read(folder) for folder in folders if folder not in unfinished]
    return sorted(finished, key=lambda run: (run.size, run.batch, str(run.path))), unfinished


def _folders(path: Path, skip_unfinished: bool) -> list[Path]:
    """``path`` itself, or the run directories right below it."""
    # A job that failed before it began to train has left no run, or not even a folder.
    if _is_run(path) or (skip_unfinished and not path.is_dir()):
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: name run directories, or a folder of them")
    found = [child for child in path.iterdir() if _is_run(child)]
    if not found and not skip_unfinished:
        raise UserError(f"{path} holds no run ({CONFIG_FILE}): name run directories, or a folder of them")
    return found or [path]


def _is_run(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def _read(folder: Path) -> Run:
    record = read_record(folder / RECORD_FILE)
    rate = record.throughput.images_per_s.median
    if not rate:
        raise UserError(
            f"{folder} has no rate (throughput.images_per_s.median is {rate}): train for more steps, or leave it out"
        )
    return Run(folder, record, load_config(folder / CONFIG_FILE), rate)
