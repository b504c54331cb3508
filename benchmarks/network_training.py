"""Training between hosts on slow cables: how many more images a second when gradients travel in half the bytes.

    python -m benchmarks.network_training --hosts 4 --rate 1gbit --engines horovod torch --json network_training.json

Hosts are namespaces of this machine (``tests/cluster``), one rank each. The net has many weights and little to compute,
so that the exchange is most of a step. A round runs ``hpctrain train`` once in each format over each engine, in random
order; the ratio of a round is images/s in fp16 over images/s in fp32. Exits 1 when a run fails.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ranks import TAIL_CHARACTERS, bare_parser, conclude
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.spread import Spread
from tests.cluster.cluster import Cluster, obstacle
from tests.cluster.jobs import launch_on

FORMATS = ("none", "fp16")
JOB_LIMIT_S = 400.0
CONFIG = Path(__file__).with_name("dense_30m.yaml")

#: of a round: engine, then format
Rounds = dict[str, list[dict[str, dict[str, Any]]]]


def train(cluster: Cluster, engine: str, compression: str, steps: int) -> dict[str, Any]:
    """One run's record, in short."""
    sets = [f"train.max_steps={steps}", f"comm.engine={engine}", f"gradients.compression={compression}"]
    run_dir = Path(tempfile.mkdtemp(prefix=f"{engine}-{compression}-", dir=cluster.shared))
    argv = ["-m", "hpctrain", "train", str(CONFIG), "--run-dir", str(run_dir)]
    argv += [part for one in sets for part in ("--set", one)]
    done = launch_on(cluster, [sys.executable, *argv], JOB_LIMIT_S, env={"OMP_NUM_THREADS": "1"})
    if done.returncode or not (run_dir / "record.json").exists():
        raise SystemExit(f"{engine} with {compression} left with {done.returncode}:\n{done.output[-TAIL_CHARACTERS:]}")
    record = json.loads((run_dir / "record.json").read_text())
    kept = {key: record[key] for key in ("plan", "phases_s", "wire", "engine")}
    return {"images_per_s": record["throughput"]["images_per_s"]["median"], **kept}


def run(cluster: Cluster, asked: argparse.Namespace) -> Rounds:
    order = random.Random(asked.seed)
    rounds: Rounds = {engine: [] for engine in asked.engines}
    jobs = [(engine, compression) for engine in asked.engines for compression in FORMATS]
    for number in range(asked.rounds):
        shuffled = order.sample(jobs, len(jobs))
        found = {job: train(cluster, *job, asked.steps) for job in shuffled}
        for engine in asked.engines:
            runs = {compression: found[engine, compression] for compression in FORMATS}
            rounds[engine].append(runs)
            shown = ", ".join(f"{name} {one['images_per_s']:.2f}" for name, one in runs.items())
            print(f"round {number + 1} of {asked.rounds}: {engine} {shown} images/s", flush=True)
    return rounds


def ratio(runs: dict[str, dict[str, Any]]) -> float:
    return float(runs["fp16"]["images_per_s"] / runs["none"]["images_per_s"])


def exchange_share(runs: dict[str, dict[str, Any]]) -> float:
    """What of a step in fp32 is waiting for the exchange."""
    phases_s = runs["none"]["phases_s"]
    return float(phases_s["exposed_comm"] / sum(phases_s.values()))


def main() -> int:
    options = bare_parser(__doc__)
    options.add_argument("--hosts", type=int, default=4)
    options.add_argument("--rate", default="1gbit", help="of each cable, as in tc(8)")
    options.add_argument("--engines", nargs="+", default=["horovod", "mpi", "torch"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--seed", type=int, default=1)
    asked = options.parse_args()
    if reason := obstacle():
        raise SystemExit(f"no hosts can be brought up: {reason}")
    provenance = Provenance([])
    with Cluster(asked.hosts, rate=asked.rate) as cluster:
        rounds = run(cluster, asked)
    ratios = {engine: Spread.of([ratio(runs) for runs in found]) for engine, found in rounds.items()}
    told = ", ".join(f"{spread.median:.2f} x over {engine}" for engine, spread in ratios.items())
    record = {
        **{key: getattr(asked, key) for key in ("hosts", "rate", "steps")},
        "config": CONFIG.name,
        "ratios": {engine: asdict(spread) for engine, spread in ratios.items()},
        "exchange_share": {engine: statistics.median(map(exchange_share, found)) for engine, found in rounds.items()},
        "rounds": rounds,
        "sentence": f"{asked.hosts} hosts at {asked.rate}: images/s in fp16 are those in fp32 {told}",
        "provenance": provenance.to_record(),
    }
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
