"""`hpctrain submit`, `requeue` and `account`: jobs of a Slurm cluster, from its login node and from within."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from hpctrain.cli.options import ConfigPath, Overrides

SbatchOptions = Annotated[
    list[str] | None, typer.Argument(metavar="-- SBATCH-OPTION", help="options that sbatch is given as they are")
]
TurnsOption = Annotated[
    str | None, typer.Option(metavar="0-9%1", help="tasks that take turns, where a site forbids requeueing")
]
TimeLimit = Annotated[
    str | None, typer.Option("--time", metavar="TIME", help="time limit of each start of the job (default: the site's)")
]
SiteFile = Annotated[
    Path | None, typer.Option("--site", metavar="FILE", help="what the cluster gives (default: $HPCTRAIN_SITE)")
]


def submit(
    config: ConfigPath,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the job")],
    more: SbatchOptions = None,
    overrides: Overrides = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a node, and ranks on it (default: all that the site has)")
    ] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="ranks of a node, on a site without GPUs")] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="comm.engine: auto, horovod, mpi or torch")] = None,
    array: TurnsOption = None,
    time_limit: TimeLimit = None,
    site: SiteFile = None,
    job_name: Annotated[str | None, typer.Option(metavar="NAME", help="default: that of the configuration")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the sbatch line and its script, and stop")] = False,
    parsable: Annotated[
        bool, typer.Option("--parsable", help="print job id, run directory and log alone, a line each, for scripts")
    ] = False,
) -> None:
    """Submit the training of CONFIG as a Slurm job, by the script slurm/train.sbatch.

    What the site cannot give is refused. A job that is preempted goes on by itself, in the same run directory.

    Other options of sbatch stand behind --, each as one word:
    `hpctrain submit configs/imagenet.yaml --nodes 4 -- --exclude=n3 --mail-user=me@example.org`
    """
    from hpctrain.launch.resources import Request
    from hpctrain.launch.submit import prepare
    from hpctrain.launch.submit import submit as submit_job

    request = Request(nodes, gpus_per_node, tasks_per_node, engine, array, time_limit, job_name, tuple(more or ()))
    submission = prepare(config, overrides or [], request, site, os.environ)
    if dry_run:
        typer.echo(submission.text())
        return
    job = submit_job(submission, os.environ)
    typer.echo(job.lines() if parsable else job.text())


def requeue(
    config: ConfigPath,
    run_dir: Annotated[Path, typer.Option("--run-dir", metavar="RUN", help="run directory of the job")],
    status: Annotated[int, typer.Option(min=1, metavar="STATUS", help="exit status of its ranks")],
    overrides: Overrides = None,
) -> None:
    """Have Slurm start the job around this command again; for job scripts.

    A job whose ranks left with 75 (preempted) is requeued. After any other failure it is requeued if a node was lost,
    if this start wrote a checkpoint, if it is the first failure from the checkpoint it began with, or if it failed
    before training began, for the first time since the job last trained. Where it may not be, or launch.max_requeues is
    reached, this command exits with the status the job should exit with.

    The task of an array is not requeued: by the same rules this command exits with 75 where the next task is to go on.
    """
    from hpctrain.config.load import load_config
    from hpctrain.launch.requeue import requeue as start_again

    launch = load_config(config, overrides or []).launch
    # Slurm ends this start by TERM as soon as it has agreed to the next one: what was done is told nevertheless.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    typer.echo(f"hpctrain: {start_again(launch, os.environ, run_dir, status)}")


def account(
    run: Annotated[Path, typer.Argument(help="run directory of a run that has ended")],
) -> None:
    """Join what `sacct` knows of a run's jobs (energy, memory, time) into its record.json, where there is a sacct."""
    from hpctrain.launch.accounting import account as join_accounts

    join_accounts(run, os.environ)
