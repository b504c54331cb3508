"""`hpctrain scaling …`: from the records of finished runs to claims about how well they scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpctrain.cli.options import ConfigPath, JsonFile, Overrides

scaling_app = typer.Typer(name="scaling", help="How the rate grew with the number of workers.", no_args_is_help=True)


@scaling_app.command("report")
def scaling_report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them")],
    skip_unfinished: Annotated[
        bool, typer.Option("--skip-unfinished", help="leave out, and name, runs that have not ended")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="write scaling.txt, scaling.csv and runs.csv there")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Images/s, speed-up and efficiency of runs that differ in size alone, for strong and weak scaling."""
    from hpctrain.scaling.command import scaling_report_command

    scaling_report_command(runs, skip_unfinished, out, json_file)


@scaling_app.command("plan")
def scaling_plan(
    config: ConfigPath,
    workers: Annotated[list[int], typer.Argument(min=1, help="the sizes, in workers (ranks, a GPU each)")],
    overrides: Overrides = None,
    strong: Annotated[bool, typer.Option("--strong", help="only strong scaling")] = False,
    weak: Annotated[bool, typer.Option("--weak", help="only weak scaling")] = False,
) -> None:
    """Print the runs of a strong and a weak series, a line each: workers, and the batch of each of them."""
    from hpctrain.config.load import load_config
    from hpctrain.scaling.plan import plan_series

    settings = load_config(config, overrides or [])
    for run in plan_series(settings, "both" if strong == weak else "strong" if strong else "weak", workers):
        typer.echo(f"{run.workers} {run.batch_per_worker}")
