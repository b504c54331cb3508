"""The command `account`: what Slurm's accounts say of the jobs that a run was made of, joined into its record.

Called by a batch script after its ranks have ended, or by anybody later. Where a cluster keeps no accounts there is
nothing to add and nothing to say. Energy is what the nodes' sensors counted; Slurm leaves it at 0 without them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import HpctrainError
from hpctrain.launch.sizes import parse_size
from hpctrain.launch.slurm import ask_slurm
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.layout import RECORD_FILE
from hpctrain.metrics.record import read_record, write_record

#: Without names, in which users may have written bars and ends of lines.
_FIELDS = (
    "JobID",
    "JobIDRaw",
    "State",
    "ExitCode",
    "ElapsedRaw",
    "MaxRSS",
    "ConsumedEnergyRaw",
    "AllocTRES",
    "NodeList",
)
#: Steps are in the accounts seconds after they have ended.
_PATIENCE_S = 10.0
_LOOK_S = 1.0
#: what sacct prints of a 64-bit figure that was never set
_UNSET = 2**64 - 2


def account(run_dir: Path, environ: Mapping[str, str], patience_s: float = _PATIENCE_S) -> None:
    """Put ``slurm {…}`` into the record of the finished run in ``run_dir``, as far as Slurm's accounts go.

    Within a job it waits, at most ``patience_s``, until the steps that have ended are in the accounts. Raises UserError
    where there is no record, MachineError where it cannot be written.
    """
    path = run_dir / RECORD_FILE
    record = read_record(path).model_dump(by_alias=True)
    jobs = _jobs_of(run_dir)
    if jobs and (starts := _read_accounts(jobs, environ, patience_s)):
        write_record(path, {**record, "slurm": summarise(starts)})


def _jobs_of(run_dir: Path) -> list[str]:
    """Numbers of the jobs that took the run up, in that order; none where it was not trained under Slurm."""
    return list(dict.fromkeys(launch.job for launch in read_launches(run_dir) if launch.job))


def _read_accounts(jobs: list[str], environ: Mapping[str, str], patience_s: float) -> list[dict[str, Any]]:
    """The starts of ``jobs``; empty where there are no accounts, or none that can be had."""
    # Of a job that was requeued sacct tells the last start alone, unless it is asked for the others.
    command = ["sacct", "--parsable2", "--duplicates", f"--jobs={','.join(jobs)}", f"--format={','.join(_FIELDS)}"]
    deadline = time.monotonic() + patience_s
    while True:
        try:
            starts = parse(ask_slurm(command, environ))
        except HpctrainError:
            return []
        if not starts or time.monotonic() >= deadline or not _is_behind(starts, environ.get("SLURM_JOB_ID", "")):
            return starts
        time.sleep(_LOOK_S)


def _is_behind(starts: list[dict[str, Any]], job: str) -> bool:
    """Whether the newest start of the job around us is still without its steps, or they without their end."""
    steps = next((start["steps"] for start in reversed(starts) if start["job"] == job), None)
    return steps is not None and (not steps or any(step["state"] == "RUNNING" for step in steps))


def parse(text: str) -> list[dict[str, Any]]:
    """The starts of jobs that ``sacct --parsable2`` tells of in its columns ``_FIELDS``, whatever their order.

    A start has its ``steps``, those of srun; the batch script's and Slurm's own are left out, since they are on the
    same nodes at the same time. Bytes, joules and seconds are numbers, or None where Slurm has none.
    """
    header, *rows = [line.split("|") for line in text.splitlines() if line.strip()] or [[]]
    starts: list[dict[str, Any]] = []
    for row in rows:
        cells = dict(zip(header, row, strict=False))
        number, _, step = cells.get("JobIDRaw", "").partition(".")
        # Tasks of an array that wait, or never began, have no nodes.
        if number and not step and cells.get("NodeList") != "None assigned":
            starts.append({"job": number, "job_id": cells.get("JobID"), **_figures(cells), "steps": []})
        elif step.isdecimal() and starts and starts[-1]["job"] == number:
            used = {"max_rss_bytes": _measured(cells.get("MaxRSS", ""), 1024)}
            starts[-1]["steps"].append({"step": int(step), **_figures(cells), **used})
    return starts


def _figures(cells: Mapping[str, str]) -> dict[str, Any]:
    status, _, signal = cells.get("ExitCode", "").partition(":")
    elapsed = cells.get("ElapsedRaw", "")
    return {
        # "CANCELLED by 1000"
        "state": cells.get("State", "").split(" ")[0],
        "exit_status": int(status) if status.isdecimal() else None,
        "exit_signal": int(signal) if signal.isdecimal() else None,
        "elapsed_s": int(elapsed) if elapsed.isdecimal() else None,
        "energy_j": _measured(cells.get("ConsumedEnergyRaw", ""), 1000) or None,
        "alloc_tres": dict(pair.split("=", 1) for pair in cells.get("AllocTRES", "").split(",") if "=" in pair),
        "nodes": cells.get("NodeList"),
    }


def _measured(text: str, base: int) -> int | None:
    size = parse_size(text, base)
    return None if size is None or size >= _UNSET else size


def summarise(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the record says under ``slurm``: totals, and the starts they are made of.

    ``elapsed_s`` is the time that allocations were held, ``energy_j`` that of all steps, and ``max_rss_bytes`` the
    most that one rank has used.
    """
    steps = [step for start in starts for step in start["steps"]]
    energies = [step["energy_j"] for step in steps if step["energy_j"] is not None]
    return {
        "elapsed_s": sum(start["elapsed_s"] or 0 for start in starts),
        "energy_j": sum(energies) if energies else None,
        "max_rss_bytes": max((step["max_rss_bytes"] for step in steps if step["max_rss_bytes"]), default=None),
        "starts": starts,
    }
