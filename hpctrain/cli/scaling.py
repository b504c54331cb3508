"""`hpctrain scaling …`: from the records of finished runs to claims about how well they scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpctrain.cli.options import JsonFile

scaling_app = typer.Typer(name="scaling", help="How the rate grew with the number of workers.", no_args_is_help=True)


@scaling_app.callback()
def _group() -> None:
    """Without it, one command alone would take the place of its group."""


@scaling_app.command("report")
def scaling_report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="write scaling.txt, scaling.csv and runs.csv there")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Images/s, speed-up and efficiency of runs that differ in size alone, for strong and weak scaling."""
    from hpctrain.scaling.command import scaling_report_command

    scaling_report_command(runs, out, json_file)
