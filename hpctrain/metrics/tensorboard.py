"""The figures of steps and evaluations as TensorBoard scalars; rank 0 alone makes a writer.

Nothing but scalars: pictures and histograms would cost steps. What reports are made from is ``steplog``.
"""

from __future__ import annotations

from pathlib import Path

from hpctrain.errors import UserError
from hpctrain.metrics.steplog import EvalFigures, StepFigures


class TensorBoardLog:
    """Writes event files into ``folder``.

    On resume from ``resumed_step`` (0: a fresh run) TensorBoard is told to forget what an earlier process
    logged for later steps, so that curves do not double. Raises UserError where tensorboard is missing.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"log.tensorboard is true but tensorboard cannot be imported ({error}); "
                "install tensorboard or set log.tensorboard=false"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def step(self, figures: StepFigures) -> None:
        """Loss, learning rate, rate and counters under ``train/``, phases under ``phases_s/``."""
        scalars = {
            "train/loss": figures.loss,
            "train/lr": figures.lr,
            "train/images_per_s": figures.images_per_s,
            **{f"train/{name}": value for name, value in figures.counters.items()},
            **{f"phases_s/{name}": value for name, value in figures.phases_s.items()},
        }
        self._write(scalars, figures.step)

    def evaluation(self, figures: EvalFigures) -> None:
        """Loss, top-1 and top-5 under ``val/``."""
        self._write({"val/loss": figures.loss, "val/top1": figures.top1, "val/top5": figures.top5}, figures.step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
