"""What it costs to launch a training and to keep it watched, on a real Slurm of four nodes.

    python -m benchmarks.launching --json launching.json

Nodes are namespaces of this machine (``tests/cluster``), and share its cores. Three parts:

- ``submit``: from the start of `hpctrain submit` to the job's id, against the same `sbatch` line typed by hand. The
  partition is down meanwhile, so that nothing runs beside it.
- ``start``: from the moment that slurmctld allocates the nodes until the last rank has taken its first training step,
  by slurm/train.sbatch with its preflight, on four nodes and on one in turn, and where the time goes. Ranks note the
  time by themselves (``launching_marks``).
- ``watch``: what watch, heartbeats, turns, phase marks and signals cost a step of 20 ms on two ranks, in the thread
  that trains and in those beside it (``launching_rank``).

Exits 1 when a bar is missed.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.launching_rank import STEP_S
from benchmarks.launching_timeline import medians, read_marks, split
from benchmarks.ranks import bare_parser, conclude
from hpctrain.data.digits import make_digits
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.spread import Spread
from tests.cluster.host import Traffic
from tests.cluster.slurm import Slurm, slurm_obstacle
from tests.cluster.training import ROOT, submit
from tests.parallel.launch import launch

NODES, RATE = 4, "1gbit"
SUBMIT_BAR_S, START_BAR, WATCH_BAR = 0.5, 3.0, 0.005
PARTS = ("submit", "start", "watch")
CONFIG = ROOT / "configs/quickstart.yaml"
SITE = ROOT / "slurm/sites/cpu.env"
TRACER = Path(__file__).with_name("launching_marks")
LIMIT_S = 300.0
#: what of `scontrol show job` is kept
JOB_FACTS = ("JobId", "JobState", "ExitCode", "Restarts", "NodeList", "SubmitTime", "StartTime", "EndTime")
_ALLOCATED = re.compile(r"^\[(\S+)\].*(?:Allocate|Started) JobId=(\d+) ", re.MULTILINE)

Part = dict[str, Any]


class Desk:
    """The head of the cluster, where jobs are submitted."""

    def __init__(self, slurm: Slurm) -> None:
        self._slurm = slurm
        self._env = {**slurm.env, "HPCTRAIN_RUNS": str(slurm.shared / "runs")}
        size = ["--nodes", str(NODES), "--tasks-per-node", "1", "--time", "10", "--site", str(SITE)]
        ours = ["hpctrain", "submit", str(CONFIG), *size]
        line = slurm.call([*ours, "--dry-run"], self._env).stdout.partition("\n")[0]
        #: ``floor`` is what entering a host takes, which is in all of them
        self._commands = {"submit": ours, "sbatch": ["env", *shlex.split(line)], "floor": ["echo", "0"]}

    def round(self, draw: random.Random) -> dict[str, float]:
        """Seconds of each command, in random order."""
        names = draw.sample(list(self._commands), len(self._commands))
        return {name: self._seconds(self._commands[name]) for name in names}

    def _seconds(self, argv: Sequence[str]) -> float:
        """From the command's start to its first line, which ends in the job's id; the job is cancelled."""
        started = time.perf_counter()
        process = self._slurm.cluster.head.start(argv, self._env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line: str = process.stdout.readline()
        seconds = time.perf_counter() - started
        process.communicate(timeout=LIMIT_S)
        job = line.split()[-1] if line else ""
        if process.returncode or not job.isdigit():
            raise SystemExit(f"{shlex.join(argv)} printed {line!r} and left with {process.returncode}")
        if job != "0":
            self._slurm.job(job).cancel()
        return seconds


def measure_submit(slurm: Slurm, rounds: int, draw: random.Random) -> Part:
    slurm.scontrol(["update", "PartitionName=main", "State=DOWN"])
    try:
        desk = Desk(slurm)
        desk.round(draw)  # fills the caches of files
        samples = [desk.round(draw) for _ in range(rounds)]
    finally:
        slurm.scontrol(["update", "PartitionName=main", "State=UP"])
    spreads = {name: Spread.of([sample[name] for sample in samples]) for name in sorted(samples[0])}
    ratio = Spread.of([sample["submit"] / sample["sbatch"] for sample in samples])
    return {
        "sentence": f"hpctrain submit prints the job's id after {told(spreads['submit'])} s, sbatch by itself after "
        f"{told(spreads['sbatch'])} s: {told(ratio)} times as long, taken in each round",
        "passed": spreads["submit"].median <= SUBMIT_BAR_S,
        "bar": SUBMIT_BAR_S,
        "seconds": {name: asdict(spread) for name, spread in spreads.items()},
        "ratio": asdict(ratio),
        "samples": samples,
    }


def start_once(slurm: Slurm, num_nodes: int) -> Part:
    """One job of one step, from allocation on: what ``split`` tells, the preflight's own figures, and what Slurm and
    the network cards tell of the job, bytes since its submission."""
    marks = Path(tempfile.mkdtemp(prefix="marks-", dir=slurm.shared))
    # Bash reads the file that BASH_ENV names before a script: the first moment of train.sbatch.
    first = marks / "first.sh"
    first.write_text(f'[[ -e "{marks}/script" ]] || echo "$EPOCHREALTIME" >"{marks}/script"\n')
    env = {
        "BASH_ENV": str(first),
        "HPCTRAIN_MARKS": str(marks),
        "PYTHONPATH": f"{TRACER}:{slurm.env['PYTHONPATH']}",
    }
    overrides = [f"data.path={slurm.shared}/digits", "train.max_steps=1", "train.eval_every_epochs=none"]
    before = traffic(slurm)
    training = submit(slurm, CONFIG, *overrides, nodes=num_nodes, tasks=1, env=env)
    if (state := training.job.wait(LIMIT_S)) != "COMPLETED":
        raise SystemExit(f"a job on {num_nodes} nodes has {state}:\n{training.job.output}")
    slurm.await_nodes("idle", slurm.names)
    facts = training.job.facts()
    preflight = json.loads((training.run / "preflight.json").read_text())
    return {
        "nodes": num_nodes,
        "slurm": {key: facts[key] for key in JOB_FACTS},
        "traffic": {name: now.since(before[name])._asdict() for name, now in traffic(slurm).items()},
        **split(allocated_s(slurm, training.job.id), float((marks / "script").read_text()), read_marks(marks)),
        "preflight": {key: preflight[key] for key in ("start_s", "cost_s")},
        "engine": training.record()["engine"]["name"],
        "loader": training.record()["data"]["loader"],
    }


def traffic(slurm: Slurm) -> dict[str, Traffic]:
    return {host.name: host.traffic() for host in slurm.cluster.hosts}


def allocated_s(slurm: Slurm, job_id: str) -> float:
    """When slurmctld gave the job its nodes, by its log, in seconds since the epoch: StartTime has whole ones."""
    return allocation((slurm.shared / "log/slurmctld.log").read_text(), job_id)


def allocation(log: str, job_id: str) -> float:
    """The last one of the job in slurmctld's log, whose times are local."""
    times = [stamp for stamp, job in _ALLOCATED.findall(log) if job == job_id]
    return datetime.fromisoformat(times[-1]).timestamp()


def measure_start(slurm: Slurm, rounds: int, draw: random.Random) -> Part:
    make_digits(slurm.shared / "digits")
    start_once(slurm, NODES)  # fills the caches of files
    samples = []
    for number in range(rounds):
        samples.append({str(nodes): start_once(slurm, nodes) for nodes in draw.sample((1, NODES), 2)})
        shown = ", ".join(f"on {nodes} {one['first_step_s']:.2f} s" for nodes, one in sorted(samples[-1].items()))
        print(f"start, round {number + 1} of {rounds}: {shown}", flush=True)
    spreads, cpu, preflight = (
        {nodes: Spread.of([sample[nodes][key] for sample in samples]) for nodes in sorted(samples[0])}
        for key in ("first_step_s", "cpu_s", "preflight_s")
    )
    ratio = Spread.of([sample[str(NODES)]["first_step_s"] / sample["1"]["first_step_s"] for sample in samples])
    return {
        "sentence": f"from allocation to the first step {told(spreads[str(NODES)])} s on {NODES} nodes and "
        f"{told(spreads['1'])} s on one: {told(ratio)} times as long, taken in each round; of that "
        f"{told(preflight[str(NODES)])} s and {told(preflight['1'])} s for the preflight",
        "passed": ratio.median <= START_BAR,
        "bar": START_BAR,
        "ratio": asdict(ratio),
        "first_step_s": {nodes: asdict(spread) for nodes, spread in spreads.items()},
        "preflight_s": {nodes: asdict(spread) for nodes, spread in preflight.items()},
        "cpu_s": {nodes: asdict(spread) for nodes, spread in cpu.items()},
        "rows_s": medians(samples, "rows_s"),
        "imports_s": medians(samples, "imports_s"),
        "simulated": f"{NODES} nodes of namespaces share the cores of one machine, on which their imports compete",
        "samples": samples,
    }


def measure_watch(seconds: float) -> Part:
    command = [sys.executable, "-m", "benchmarks.launching_rank", str(seconds)]
    done = launch("mpirun", 2, command, LIMIT_S + seconds)
    if done.returncode or len(done.results) < 2:
        raise SystemExit(f"two ranks left with {done.returncode}:\n{done.output}")
    ranks = [watch_share(done.results[rank]) for rank in range(2)]
    worst = max(ranks, key=lambda rank: float(rank["share"]))
    return {
        "sentence": f"watch, turns, phases and signals cost {worst['share']:.3%} of a step of {STEP_S * 1e3:.0f} ms: "
        f"{worst['main_us']:.1f} us of the thread that trains, {worst['beside_us']:.1f} us of CPU beside it",
        "passed": worst["share"] <= WATCH_BAR,
        "bar": WATCH_BAR,
        "share": worst["share"],
        "ranks": ranks,
    }


def watch_share(rank: Mapping[str, Any]) -> Part:
    """A rank's figures, with the microseconds of a step and its share that all of it is, by means."""
    straggler_us = rank["judge_us"]["2"] / rank["log_every_steps"]
    main_us = rank["turns_us"]["mean"] + rank["phases_us"]["mean"] + straggler_us
    beside_us = sum(rank["threads_cpu_s_per_s"].values()) * STEP_S * 1e6
    share = (main_us + beside_us) * 1e-6 / STEP_S
    return {"main_us": main_us, "beside_us": beside_us, "straggler_us": straggler_us, "share": share, **rank}


def told(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.p5:.3g} to {spread.p95:.3g})"


def main() -> int:
    options = bare_parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--submits", type=int, default=20, help="rounds of the part submit")
    options.add_argument("--starts", type=int, default=7, help="rounds of the part start, two jobs each")
    options.add_argument("--seconds", type=float, default=60.0, help="of the part watch")
    options.add_argument("--seed", type=int, default=0, help="of the order within rounds")
    asked = options.parse_args()
    if (reason := slurm_obstacle()) is not None:
        options.error(f"no Slurm can be brought up here: {reason}")
    draw, provenance = random.Random(asked.seed), Provenance([])
    measures: dict[str, Callable[[Slurm], Part]] = {
        "submit": lambda slurm: measure_submit(slurm, asked.submits, draw),
        "start": lambda slurm: measure_start(slurm, asked.starts, draw),
    }
    parts: dict[str, Part] = {}
    if measured := [name for name in measures if name in asked.parts]:
        with Slurm(num_nodes=NODES, tasks_per_node=2, rate=RATE) as slurm:
            parts = {name: measures[name](slurm) for name in measured}
    if "watch" in asked.parts:
        parts["watch"] = measure_watch(asked.seconds)
    for row, seconds in parts.get("start", {}).get("rows_s", {}).items():
        print(f"{row:42}" + "".join(f"{one:8.2f} s on {nodes}" for nodes, one in seconds.items()))
    record = {
        "sentence": "; ".join(part["sentence"] for part in parts.values()),
        "passed": all(part["passed"] for part in parts.values()),
        **parts,
        "provenance": provenance.to_record(),
    }
    for name, part in parts.items():
        print(f"{name} {'keeps to' if part['passed'] else 'misses'} its bar")
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
