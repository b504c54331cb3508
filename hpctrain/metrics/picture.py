"""The learning curve of a run as a picture to print: loss, accuracy and learning rate over epochs.

Drawn once at the end, from the lines of ``steplog``. A million steps cost no more ink than two thousand:
longer curves are drawn as the median and the range of equal pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.metrics.jsonfiles import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_PIECES = 1000
_SMOOTHING_SHARE = 0.04
DPI = 200
# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"
STYLE: Any = {
    "font.size": 11, "axes.titlesize": 13, "axes.labelsize": 11, "legend.fontsize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def draw_learning_curve(
    path: Path, steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Write a PNG to ``path`` from the lines of ``steps.jsonl`` and ``evals.jsonl``.

    Null figures are gaps; with no evaluations there is no panel of accuracy. Raises MachineError when the
    file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    heights = [3.0, 2.2, 1.0] if evals else [3.0, 1.0]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 1.1 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        figure.suptitle(title, fontsize=13, fontweight="bold")
        _draw_loss(panels[0], steps, evals)
        if evals:
            _draw_accuracy(panels[1], evals)
        _draw_lr(panels[-1], steps)
        _limit_epochs(panels[-1], [*_column(steps, "epoch"), *_column(evals, "epoch")])
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.align_ylabels()
        encoded = BytesIO()
        figure.savefig(encoded, format="png", dpi=DPI)
    write_atomic(path, encoded.getvalue())


def _draw_loss(axes: Axes, steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> None:
    epochs, losses, judged = _column(steps, "epoch"), _column(steps, "loss"), _column(evals, "loss")
    pieces = Pieces(epochs, losses)
    smooth = smoothed(pieces.median)
    if len(losses) > _MAX_PIECES:
        axes.fill_between(pieces.x, pieces.low, pieces.high, color=BLUE, alpha=0.25, linewidth=0, label="train, range")
    else:
        axes.plot(epochs, losses, color=BLUE, alpha=0.5, linewidth=0.8, **_dots(losses, 1), label="train")
    axes.plot(pieces.x, smooth, color=BLUE, linewidth=1.8, label="train, smoothed")
    if evals:
        dots = _dots(judged, 60)
        axes.plot(_column(evals, "epoch"), judged, color=VERMILION, linewidth=1.4, **dots, label="validation")
    axes.set_ylabel("loss")
    _limit_loss(axes, losses, smooth, judged)
    axes.legend(loc="upper right")


def _draw_accuracy(axes: Axes, evals: Sequence[Mapping[str, Any]]) -> None:
    epochs, top1 = _column(evals, "epoch"), 100 * _column(evals, "top1")
    axes.plot(epochs, top1, color=VERMILION, linewidth=1.4, **_dots(top1, 60))
    axes.set_ylabel("validation\ntop-1 (%)")
    if np.isfinite(top1).any():
        best = int(np.nanargmax(top1))
        axes.plot(epochs[best], top1[best], color=VERMILION, marker="o", markersize=8, fillstyle="none")
        axes.set_title(f"best {top1[best]:.2f} % at epoch {epochs[best]:.4g}", loc="right", fontsize=10, color=GREY)


def _draw_lr(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    rates = _column(steps, "lr")
    pieces = Pieces(_column(steps, "epoch"), rates)
    axes.plot(pieces.x, pieces.median, color=GREY, linewidth=1.4, **_dots(rates, 1))
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("learning\nrate")
    axes.set_xlabel("epoch")


class Pieces:
    """A curve ``y`` [n] over ``x`` [n], cut into at most 1,000 pieces of equal length.

    Of each piece the mean of ``x`` and ``median``, ``low`` and ``high`` of the finite values of ``y``: NaN for
    a piece that has none.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        pieces = [piece for piece in np.array_split(np.arange(len(y)), min(_MAX_PIECES, max(1, len(y)))) if len(piece)]
        self.x = np.array([x[piece].mean() for piece in pieces])
        self.median = np.array([_of_finite(np.median, y[piece]) for piece in pieces])
        self.low = np.array([_of_finite(np.min, y[piece]) for piece in pieces])
        self.high = np.array([_of_finite(np.max, y[piece]) for piece in pieces])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred running median of ``values`` [n] over 4 % of them (at least 3), shorter at both ends.

    A median, since a single spike says nothing about the course. NaN values are left out.
    """
    reach = max(1, round(len(values) * _SMOOTHING_SHARE / 2))
    windows = [values[max(0, centre - reach) : centre + reach + 1] for centre in range(len(values))]
    return np.array([_of_finite(np.median, window) for window in windows])


def _of_finite(statistic: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(statistic(finite)) if len(finite) else np.nan


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One key of all lines, [lines] float64; null is NaN."""
    return np.array([np.nan if line[key] is None else line[key] for line in lines], dtype=np.float64)


def _dots(values: np.ndarray, most: int) -> dict[str, Any]:
    """Dots on a curve of at most ``most`` points: a single one has no line."""
    return {"marker": "o", "markersize": 4} if len(values) <= most else {}


def _limit_loss(axes: Axes, losses: np.ndarray, smooth: np.ndarray, judged: np.ndarray) -> None:
    """Leave spikes outside the picture, so that they do not flatten the curve."""
    top = _of_finite(np.max, smooth)
    values = np.concatenate([losses, judged])
    shown = values if np.isnan(top) else values[values <= 1.5 * top]
    low, high = _of_finite(np.min, shown), _of_finite(np.max, shown)
    if np.isfinite([low, high]).all():
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _limit_epochs(axes: Axes, epochs: Sequence[float]) -> None:
    if epochs:
        axes.set_xlim(min(0.0, *epochs), max(epochs) * 1.01)
