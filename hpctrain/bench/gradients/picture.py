"""The times of `bench gradients` as bars: every competitor, both formats, with their spread over the rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.bench.gradients.measure import FORMATS
from hpctrain.metrics.jsonfiles import write_atomic
from hpctrain.metrics.picture import BLUE, DPI, GREY, STYLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 0.38
#: of ours and of others
_COLOURS = {True: {"fp16": BLUE, "fp32": BLUE}, False: {"fp16": VERMILION, "fp32": VERMILION}}
_FADED = {"fp16": 1.0, "fp32": 0.45}


def draw_times(path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG to ``path`` from the record. Raises MachineError when the file cannot be written."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The fastest on top, by the first format it takes part in.
    names = sorted(record["variants"], key=lambda name: _order(record["variants"][name]))
    settings = record["settings"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 1.9 + 0.62 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, name in enumerate(names):
            _draw_competitor(axes, place, record["variants"][name], name.startswith("hpctrain"))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0.0, right=1.12 * axes.get_xlim()[1])
        axes.set_xlabel("ms for one exchange: median, and 5 to 95 % of the rounds")
        figure.suptitle(
            f"Mean of {settings['tensors']} gradients ({settings['model']['name']}, "
            f"{settings['elements'] / 1e6:.1f} M) over {settings['ranks']} ranks, {settings['device']}",
            fontsize=12,
            fontweight="bold",
        )
        _draw_legend(axes)
        encoded = BytesIO()
        figure.savefig(encoded, format="png", dpi=DPI)
    write_atomic(path, encoded.getvalue())


def _order(figures: Mapping[str, Any]) -> float:
    return next((float(figures[form]["step_s"]["median"]) for form in FORMATS if form in figures), math.inf)


def _draw_competitor(axes: Axes, place: int, figures: Mapping[str, Any], is_ours: bool) -> None:
    for number, form in enumerate(FORMATS):
        if form not in figures:
            continue
        spread = {key: 1e3 * value for key, value in figures[form]["step_s"].items()}
        y, median = place + (number - 0.5) * _BAR, spread["median"]
        axes.barh(y, median, height=0.9 * _BAR, color=_COLOURS[is_ours][form], alpha=_FADED[form])
        whiskers = [[median - spread["p5"]], [spread["p95"] - median]]
        axes.errorbar(median, y, xerr=whiskers, color=GREY, linewidth=1.0, capsize=2.5)
        axes.annotate(
            f"{median:.3g}", (spread["p95"], y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )


def _draw_legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[
            Patch(color=_COLOURS[is_ours][form], alpha=_FADED[form], label=f"{whose}, {form}")
            for is_ours, whose in ((True, "hpctrain"), (False, "others"))
            for form in FORMATS
        ],
        loc="upper right",
    )
