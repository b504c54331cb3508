"""The engines' contract on one and on two ranks, on CPUs or one GPU: which engines keep it, which are not here.

    python -m benchmarks.engines --device cuda --ranks 2 --json engines.json

Exits 1 when an engine that is here breaks the contract, or when none is.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.ranks import TAIL_CHARACTERS, conclude, launcher_of, missing_launcher, parser, run
from hpctrain.doctor.machine import examine
from hpctrain.metrics.provenance import Provenance

ENGINES = ("horovod", "mpi", "torch", "serial")


@dataclass
class Job:
    """One engine on so many ranks. ``status`` is passed, failed, absent, or not run (the time was up)."""

    engine: str
    ranks: int
    launcher: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    failures: dict[int, Any] = field(default_factory=dict)
    output: str = ""


def check(engine: str, ranks: int, device: str, limit_s: float) -> Job:
    """Run all checks of the contract once."""
    command = [sys.executable, "tests/parallel/contract.py", "--engine", engine, "--device", device]
    done = run(engine, ranks, device, command, limit_s)
    failures = {rank: found["failures"] for rank, found in done.results.items() if found["failures"]}
    passed = done.returncode == 0 and len(done.results) == ranks and not failures and not done.survivors
    job = Job(engine, ranks, launcher_of(engine, ranks), "passed" if passed else "failed", failures=failures)
    job.seconds = round(done.wall_s, 1)
    if not passed:
        job.reason = "over the time limit" if done.timed_out else f"exit status {done.returncode}"
        job.output = done.output[-TAIL_CHARACTERS:]
    return job


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--ranks", type=int, default=1)
    asked = options.parse_args()
    deadline, provenance = time.monotonic() + asked.limit_s, Provenance([])
    absent = {probe.name: probe.reason for probe in examine().engines if not probe.ok}
    jobs = []
    for engine in ENGINES if asked.ranks == 1 else ENGINES[:-1]:
        left_s = deadline - time.monotonic()
        reason = absent.get(engine) or missing_launcher(engine, asked.ranks)
        if reason or left_s < 1:
            status = "absent" if reason else "not run"
            jobs.append(Job(engine, asked.ranks, launcher_of(engine, asked.ranks), status, reason or "time is up"))
        else:
            jobs.append(check(engine, asked.ranks, asked.device, min(left_s, 120)))
        print(f"{engine} on {asked.ranks}: {jobs[-1].status} {jobs[-1].reason}", flush=True)
    statuses = {job.status for job in jobs}
    record = {
        "passed": "passed" in statuses and "failed" not in statuses,
        "device": asked.device,
        "sentence": f"{asked.ranks} ranks: " + ", ".join(f"{job.engine} {job.status}" for job in jobs),
        "jobs": [asdict(job) for job in jobs],
        "provenance": provenance.to_record(),
    }
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
