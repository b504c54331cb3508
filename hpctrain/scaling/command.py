"""What ``hpctrain scaling report`` does: read, print, write. It needs no torch, and no run is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpctrain.errors import UserError
from hpctrain.metrics.jsonfiles import to_text as json_text
from hpctrain.metrics.jsonfiles import write_atomic
from hpctrain.scaling.render import render, to_text
from hpctrain.scaling.report import make_report, runs_csv, to_csv, to_record


def scaling_report_command(
    paths: Sequence[Path], skip_unfinished: bool, out: Path | None, json_file: Path | None
) -> None:
    """Print the report on the runs in ``paths``; tables as text and CSV go to ``out``, all of it to ``json_file``.

    Raises UserError when the runs make no report or ``out`` cannot be a folder, MachineError when a disk refuses.
    """
    report = make_report(paths, skip_unfinished)
    files: dict[Path, str] = {}
    if out is not None:
        files = {out / "scaling.txt": to_text(report), out / "scaling.csv": to_csv(report)}
        files[out / "runs.csv"] = runs_csv(report)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"cannot make the folder {out} ({reason}): give another --out") from error
    if json_file is not None:
        files[json_file] = json_text(to_record(report))
    for path, text in files.items():
        write_atomic(path, text.encode())
    render(report)
