"""Exchanges of gradients between hosts on slow cables: time against the ring's bound, bytes on the wire, overlap.

    python -m benchmarks.network --hosts 4 --rate 1gbit --json network.json

Hosts are namespaces of this machine (``tests/cluster``), one rank each. Every round starts each competitor anew, in
random order. The bound is that of any all-reduce by a ring: 2 (N - 1) / N of the buffer's bytes, in its format on the
wire, at the payload rate of a cable, which is measured in the same run. ``passed`` tells whether our exchange in fp16
took at most 1.1 of it over each engine. Exits 1 when it did not, or when a mean is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.ranks import TAIL_CHARACTERS, bare_parser, conclude
from hpctrain.bench.gradients.groups import GROUPS, OURS, group_named
from hpctrain.bench.gradients.measure import TOLERANCE
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.spread import Spread
from tests.cluster.cluster import Cluster, obstacle
from tests.cluster.flows import payload_rate
from tests.cluster.jobs import launch_on

WIRE_BYTES = {"none": 4, "fp16": 2, "fp16_ef": 2, "bf16": 2}
JOB_LIMIT_S = 300.0
BAR = 1.1
DEFAULT_GROUPS = ("hpctrain_horovod", "hpctrain_mpi", "hpctrain_torch", "horovod_mpi", "ddp")
_OURS = {group.name for group in OURS}

Setting = dict[str, str]


class Failure(Exception):
    """A competitor came to a bad end, or to a wrong mean."""


def settings_of(group: str, compressions: Sequence[str], reductions: Sequence[str]) -> list[Setting]:
    """What a competitor is measured in; peers know no reductions."""
    known = reductions if group in _OURS else ("engine",)
    return [{"compression": compression, "reduction": reduction} for compression in compressions for reduction in known]


class Bench:
    """The samples of one run: by competitor, compression and reduction, one a round."""

    def __init__(self, cluster: Cluster, asked: argparse.Namespace) -> None:
        self._cluster, self._asked = cluster, asked
        self._samples: defaultdict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
        self.absent: dict[str, str] = {}
        self.rates: list[float] = []
        self.elements = 0

    def round(self, order: Sequence[str]) -> None:
        """One sample of everything. Raises Failure."""
        sender, receiver = self._cluster.hosts[:2]
        self.rates.append(payload_rate(sender, receiver))
        for group in order:
            self._run(group)

    def _run(self, group: str) -> None:
        settings = settings_of(group, self._asked.compression, self._asked.reduction)
        task = {"group": group, "model": self._asked.model, "settings": settings, "steps": self._asked.steps}
        env = dict(pair.split("=", 1) for pair in self._asked.env)
        command = [sys.executable, "-m", "benchmarks.network_rank", json.dumps(task)]
        job = launch_on(self._cluster, command, JOB_LIMIT_S, env=env)
        ranks = [job.results.get(rank) for rank in range(self._asked.hosts)]
        if job.returncode or None in ranks:
            raise Failure(f"{group} left with {job.returncode}\n{job.output[-TAIL_CHARACTERS:]}")
        if reason := ranks[0].get("absent"):
            self.absent[group] = reason
            return
        if len({rank["host"] for rank in ranks}) < self._asked.hosts:
            raise Failure(f"{group} did not run on {self._asked.hosts} hosts")
        self.elements = ranks[0]["elements"]
        for number, setting in enumerate(settings):
            self._take(group, setting, [rank["rows"][number] for rank in ranks])

    def _take(self, group: str, setting: Setting, rows: Sequence[Mapping[str, Any]]) -> None:
        name = (group, setting["compression"], setting["reduction"])
        if reason := rows[0].get("absent"):
            self.absent[" ".join(name)] = reason
            return
        worst = max(rows, key=lambda row: float(row["apart"]))
        if not worst["apart"] <= TOLERANCE[setting["compression"]]:
            raise Failure(f"{' '.join(name)} is wrong: {worst['tensor']} is off by {worst['apart']:.2g}")
        hidden_s, compute_s = duration_s(rows, "hidden"), max(row["compute_s"] for row in rows)
        self._samples[name].append(
            {
                "alone_s": duration_s(rows, "alone"),
                "compute_s": compute_s,
                "exposed_s": max(0.0, hidden_s - compute_s),
                "sent_bytes": statistics.fmean(row["alone"]["sent_bytes"] for row in rows),
            }
        )

    def describe(self) -> list[dict[str, Any]]:
        """A row for each competitor and setting, fastest competitors first within a compression."""
        rows = [self._describe(name, samples) for name, samples in self._samples.items()]
        return sorted(rows, key=lambda row: (row["compression"], row["alone_s"]["median"]))

    def _describe(self, name: tuple[str, str, str], samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        group, compression, reduction = name
        hosts = self._asked.hosts
        ring_bytes = 2 * (hosts - 1) / hosts * WIRE_BYTES[compression] * self.elements
        bound_s = ring_bytes / self.payload_rate
        alone = Spread.of([sample["alone_s"] for sample in samples])
        exposed = Spread.of([sample["exposed_s"] / sample["alone_s"] for sample in samples])
        return {
            "competitor": group,
            "what": group_named(group).what,
            "compression": compression,
            "reduction": reduction,
            "alone_s": asdict(alone),
            "bound_s": bound_s,
            "over_bound": alone.median / bound_s,
            "sent_over_ring": statistics.median(sample["sent_bytes"] for sample in samples) / ring_bytes,
            "exposed_share": asdict(exposed),
            "samples": [dict(sample) for sample in samples],
        }

    @property
    def payload_rate(self) -> float:
        """Bytes a second of a cable: the best of the run, so that the bound is not too easy."""
        return max(self.rates)


def duration_s(rows: Sequence[Mapping[str, Any]], phase: str) -> float:
    """Mean over the exchanges, each from the last rank's begin to the last rank's end."""
    began = zip(*(row[phase]["began"] for row in rows), strict=True)
    ended = zip(*(row[phase]["ended"] for row in rows), strict=True)
    return statistics.fmean(max(ends) - max(begins) for begins, ends in zip(began, ended, strict=True))


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By compression and peer: the peer's time over that of each of ours, in its fastest reduction."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    # Rows are sorted by time, so the first of a competitor is its best.
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        best.setdefault((row["compression"], row["competitor"]), row["alone_s"]["median"])
    for (compression, peer), peer_s in best.items():
        for (other, ours), ours_s in best.items():
            if peer not in _OURS and ours in _OURS and other == compression:
                found[compression][f"{peer} / {ours}"] = peer_s / ours_s
    return dict(found)


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether our exchange in fp16, in its fastest reduction, keeps to the bar over each engine; without one no bar."""
    ours: dict[str, float] = {}
    for row in rows:
        if row["competitor"] in _OURS and row["compression"] == "fp16":
            ours.setdefault(row["competitor"], row["over_bound"])
    if not ours:
        return {"sentence": "nothing of ours was measured in fp16"}
    told = ", ".join(f"{over_bound:.3f} ({name})" for name, over_bound in ours.items())
    sentence = f"an exchange in fp16 takes {told} times what a ring must take"
    return {"sentence": sentence, "passed": max(ours.values()) <= BAR, "bar": BAR}


def options() -> argparse.Namespace:
    parser = bare_parser(__doc__)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of each cable, as in tc(8)")
    parser.add_argument("--model", default="resnet50")
    names = [group.name for group in GROUPS if group.name != "horovod_gloo"]
    parser.add_argument("--groups", nargs="+", choices=names, default=DEFAULT_GROUPS, metavar="GROUP")
    parser.add_argument("--compression", nargs="+", choices=WIRE_BYTES, default=("none", "fp16"))
    parser.add_argument("--reduction", nargs="+", default=("engine", "ordered"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="exchanges in a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for all ranks")
    return parser.parse_args()


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'competitor':18} {'wire':8} {'reduction':10} {'ms':>8} {'x bound':>8} {'x bytes':>8} {'exposed':>8}")
    for row in rows:
        print(
            f"{row['competitor']:18} {row['compression']:8} {row['reduction']:10} "
            f"{row['alone_s']['median'] * 1e3:8.1f} {row['over_bound']:8.3f} {row['sent_over_ring']:8.3f} "
            f"{row['exposed_share']['median']:8.1%}"
        )


def main() -> int:
    asked = options()
    if reason := obstacle():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    provenance, generator = Provenance([]), random.Random(asked.seed)
    with Cluster(asked.hosts, asked.rate) as cluster:
        bench = Bench(cluster, asked)
        try:
            for number in range(asked.rounds):
                bench.round(generator.sample(list(asked.groups), len(asked.groups)))
                print(f"round {number + 1} of {asked.rounds}", flush=True)
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    rows = bench.describe()
    record = {
        **verdict(rows),
        "hosts": asked.hosts,
        "rate": asked.rate,
        "payload_bytes_per_s": bench.rates,
        "model": asked.model,
        "elements": bench.elements,
        "steps": asked.steps,
        "environment_of_ranks": asked.env,
        "rows": rows,
        "ratios": ratios(rows),
        "absent": bench.absent,
        "simulated": "hosts are namespaces of one machine, compute behind which communication hides is a sleep",
        "provenance": provenance.to_record(),
    }
    print_rows(rows)
    for name, reason in bench.absent.items():
        print(f"{name} was not measured: {reason}")
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
