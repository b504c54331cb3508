"""A disk that takes its time, or stands still, for the checkpoints of the jobs that are told so."""

from __future__ import annotations

from pathlib import Path

from hpctrain.metrics.layout import CHECKPOINTS
from tests.cluster.slurm import Slurm
from tests.cluster.training import Training

_SLOWLY = Path(__file__).with_name("slowly")
#: longer than any test
_HELD_S = 3600.0


class SlowDisk:
    """Of the jobs that are given ``env``: each flush of a checkpoint takes ``delay_s``, as long as it says at the time.

    While the disk is held no checkpoint comes to its end, and so no training gets further than to the next but one.
    """

    def __init__(self, slurm: Slurm, name: str) -> None:
        self._path = slurm.shared / f"delay-of-{name}"
        self.env = {
            "PYTHONPATH": f"{_SLOWLY}:{slurm.env['PYTHONPATH']}",
            "HPCTRAIN_TEST_DELAY": str(self._path),
        }
        self.delay_s(0)

    def delay_s(self, seconds: float) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(str(seconds))
        partial.replace(self._path)

    def hold(self) -> None:
        self.delay_s(_HELD_S)

    def release(self) -> None:
        self.delay_s(0)


def half_written(training: Training) -> list[Path]:
    """Checkpoints that are being written, or were when their writer was killed."""
    return list((training.run / CHECKPOINTS).glob(".step-*.partial"))
