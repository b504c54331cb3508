"""The command line: what can be typed, and nothing of how it is done. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpctrain import __version__
from hpctrain.cli.bench import bench_app
from hpctrain.cli.config import print_config
from hpctrain.cli.data import data_app
from hpctrain.cli.launch import account, requeue, submit
from hpctrain.cli.options import ConfigPath, JsonFile, JsonMayStandAlone, Overrides, ended_by_interrupt
from hpctrain.cli.scaling import scaling_app
from hpctrain.errors import HpctrainError, UserError

app = typer.Typer(
    name="hpctrain",
    help="Train image classifiers on many GPUs, and measure how well it scaled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (data_app, bench_app, scaling_app):
    app.add_typer(group)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="auto: newest complete checkpoint of the run directory")
    ] = "auto",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="default: runs/<config>-<time>")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Train as CONFIG says, on all ranks the launcher started.

    One rank: `hpctrain train …`; more: `horovodrun -np N hpctrain train …`, or the same behind mpirun, srun
    or torchrun.

    Exit status: 0 finished, 1 a fault of the machine, 2 a mistake in what was asked for, 75 stopped by a signal or a
    time limit, with a checkpoint. torchrun and horovodrun --gloo turn every non-zero status into 1; the other launchers
    pass it through.
    """
    from hpctrain.config.load import load_config
    from hpctrain.launch.continuing import TrainCommand
    from hpctrain.launch.preempt import Requests

    settings = load_config(config, overrides or [])
    # From here on, since the imports take seconds in which a signal would end the process without a word.
    with Requests(None if dry_run else settings.launch.signals) as requests:
        with ended_by_interrupt():
            from hpctrain.train.main import print_plan, train_command

        if dry_run:
            print_plan(settings)
        else:
            command = TrainCommand(config, tuple(overrides or ()))
            train_command(settings, command, resume=resume, run_dir=run_dir, requests=requests)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory, or one of its checkpoints")],
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Exact top-1 and top-5 of a checkpoint on its whole validation part."""
    with ended_by_interrupt():
        from hpctrain.train.main import eval_command

    eval_command(run, overrides or [], json_file)


@app.command(cls=JsonMayStandAlone)
def doctor(
    config: Annotated[Path | None, typer.Argument(help="with --job: the YAML recipe that is to be trained")] = None,
    overrides: Overrides = None,
    job: Annotated[bool, typer.Option("--job", help="look at the whole job that these ranks are in")] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="with --job: see that all hosts share it")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="[FILE]", help="write the result there as JSON; without FILE, print it instead"),
    ] = None,
) -> None:
    """Tell what each engine and loader needs and has; exit 0 when `auto` would work.

    With --job, behind srun, mpirun or horovodrun in an allocation: where each rank runs, what is wrong with that,
    and which node is slow or broken. What it writes is then also in DIR/preflight.json, where --run-dir names DIR.
    """
    if job:
        _doctor_job(config, overrides or [], run_dir, json_file)
        return
    if config is not None or overrides or run_dir is not None:
        raise UserError(
            "a configuration, --set and --run-dir are for `hpctrain doctor --job`: add --job, or leave them out"
        )
    from hpctrain.doctor.machine import examine, render, to_record
    from hpctrain.doctor.outcome import tell

    report = examine()
    tell(to_record(report), lambda: render(report), json_file)
    raise typer.Exit(report.exit_code)


def _doctor_job(config: Path | None, overrides: list[str], run_dir: Path | None, json_file: Path | None) -> None:
    from hpctrain.config.load import load_config

    if config is None:
        raise UserError(
            "doctor --job looks at what training will meet: name its configuration, such as configs/imagenet.yaml, "
            "before --json"
        )
    settings = load_config(config, overrides)
    with ended_by_interrupt():
        from hpctrain.doctor.job import job_command

    job_command(settings, run_dir, json_file)


app.command("config")(print_config)
app.command()(submit)
app.command()(requeue)
app.command()(account)


def main() -> None:
    """Run the command line; user errors become one sentence and exit status 2."""
    # Torch's C++ part would add stack traces of its own to our messages when a peer is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()
    except HpctrainError as error:
        from hpctrain.topology.voice import report_early

        sys.exit(report_early(error, os.environ))
