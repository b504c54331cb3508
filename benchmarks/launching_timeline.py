"""From the marks that the ranks of a job left (``launching_marks``) to where the time of its start went: pure.

A row of the timeline ends when the last rank has come to its station: all wait for the last one somewhere further on,
and rows add up to the whole.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

#: what a row is, and the command and mark that it ends with; the rows before these are Slurm's
STATIONS = (
    ("the script, its srun, python's start", "doctor", "process.begin"),
    ("preflight: imports", "doctor", "job_command.begin"),
    ("preflight: libraries of the engine", "doctor", "choose.end"),
    ("preflight: the engine's start", "doctor", "create.end"),
    ("preflight: side channel, places, clocks", "doctor", "measure.begin"),
    ("preflight: products and sums", "doctor", "examine_job.end"),
    ("its end, the next srun", "train", "process.begin"),
    ("imports", "train", "train_command.begin"),
    ("libraries of the engine", "train", "choose.end"),
    ("the engine's start", "train", "create.end"),
    ("side channel, run directory", "train", "train.begin"),
    ("data set", "train", "open_data.end"),
    ("model and exchange", "train", "build_parts.end"),
    ("checkpoint, loaders", "train", "build_feeds.end"),
    ("first batch", "train", "Parts.to_device.begin"),
    ("first step", "train", "train_step.end"),
)

#: before the name of a library in the marks of its import
_IMPORT = "import:"

#: by command, then by rank: seconds since the epoch and seconds of CPU of each mark
Marks = Mapping[str, Sequence[Mapping[str, tuple[float, float]]]]


def read_marks(folder: Path) -> Marks:
    found: dict[str, list[dict[str, tuple[float, float]]]] = {"doctor": [], "train": []}
    for path in sorted(folder.glob("*-[0-9]*")):
        rows = (line.split() for line in path.read_text().splitlines())
        found[path.name.partition("-")[0]].append({name: (float(at), float(cpu)) for name, at, cpu in rows})
    return found


def split(allocated_s: float, script_s: float, marks: Marks) -> dict[str, Any]:
    """Seconds of all until the last rank's first step, of the preflight in it, of each row, and of imports in the rows.

    ``allocated_s`` and ``script_s`` are when the nodes were given to the job and when its script began. ``cpu_s`` is
    what all ranks used of the cores, preflight included.
    """
    ends = {what: _all_past(marks, command, mark) for what, command, mark in STATIONS}
    moments = {"": allocated_s, "slurmctld and slurmd": script_s, **ends}
    rows = {what: end - begin for (_, begin), (what, end) in pairwise(moments.items())}
    last = {"doctor": "examine_job.end", "train": "train_step.end"}
    return {
        "first_step_s": sum(rows.values()),
        "preflight_s": _all_past(marks, "train", "process.begin") - _all_past(marks, "doctor", "process.begin"),
        "cpu_s": sum(rank[mark][1] for command, mark in last.items() for rank in marks[command]),
        "rows_s": rows,
        "imports_s": {
            f"{command}: {library.removeprefix(_IMPORT)}": statistics.median(_seconds(rank, library) for rank in ranks)
            for command, ranks in marks.items()
            for library in _imported(ranks)
        },
    }


def _all_past(marks: Marks, command: str, mark: str) -> float:
    return max(rank[mark][0] for rank in marks[command])


def _imported(ranks: Sequence[Mapping[str, tuple[float, float]]]) -> list[str]:
    """What all of the ranks have imported, as it stands in their marks."""
    ended = [mark for mark in ranks[0] if mark.startswith(_IMPORT) and mark.endswith(".end")]
    return [mark.removesuffix(".end") for mark in ended if all(mark in rank for rank in ranks)]


def _seconds(rank: Mapping[str, tuple[float, float]], name: str) -> float:
    return rank[f"{name}.end"][0] - rank[f"{name}.begin"][0]


def medians(samples: Sequence[Mapping[str, Mapping[str, Any]]], key: str) -> dict[str, dict[str, float]]:
    """Of each figure under ``key``, by number of nodes."""
    return {
        row: {nodes: statistics.median(sample[nodes][key][row] for sample in samples) for nodes in sorted(samples[0])}
        for row in samples[0]["1"][key]
    }
