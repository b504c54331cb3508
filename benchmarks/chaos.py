"""Strikes one long training again and again, and shows that nothing of it is lost but time.

    python -m benchmarks.chaos --kills 100 --json chaos.json

A training on two of four nodes of a real Slurm, submitted by `slurm/train.sbatch` and never touched again: ranks are
killed, nodes lose their power or crash, cables are out for five seconds or for good, at steps and in an order that
``--seed`` draws. The job finds its own way back each time. At the end its parameters are compared, bit for bit, with
those of the same training on one machine to which nothing happened, and its sample log with that one's: a sample is
lost or doubled where an epoch counts it less or more often.

Of each kill is told how long it took until the job had noticed (``detection_s``), until Slurm had started it again
(``wait_s``: six seconds of it are Slurm's own, after a requeue), until it went on from its checkpoint (``start_s``),
and until the steps since then were done again (``redone_s``); ``lost_s`` is all of it, from the kill to the step after
it, less a step's own time.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ranks import bare_parser, conclude
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.layout import LAUNCHES_FILE
from hpctrain.metrics.provenance import Provenance
from hpctrain.train.samples import samples_seen
from tests.cluster.slurm import Slurm, slurm_obstacle
from tests.cluster.slurm_job import ENDED
from tests.cluster.training import Training, digits_config, kill_ranks, lines_of, record_of, submit, train_alone

NODES, RATE = 2, "200mbit"
#: steps between two kills; a checkpoint is written every 5, so that each start gets further than the one before
GAP_STEPS = (12, 48)
#: for the job to be back, and for the training alone
LIMIT_S = 300.0
_STEP_SAMPLE = 200


@dataclass(frozen=True)
class Cause:
    """``strike(slurm, node)`` does it to a node of the job, ``repair(slurm, node)`` undoes it; ``weight`` is its share.

    ``restarts`` is false where the job has to live through it.
    """

    name: str
    weight: int
    strike: Callable[[Slurm, str], None]
    repair: Callable[[Slurm, str], None] = lambda slurm, node: None
    restarts: bool = True


@dataclass(frozen=True)
class Kill:
    """One kill and what it cost; None where the job was not started again."""

    cause: str
    node: str
    step: int
    resumed_step: int | None
    detection_s: float | None
    wait_s: float | None
    start_s: float | None
    redone_s: float | None
    lost_s: float
    by_hand: bool


def pull_cable_for_5_s(slurm: Slurm, node: str) -> None:
    slurm.cluster.cut(node)
    time.sleep(5)
    slurm.cluster.mend(node)


def reboot(slurm: Slurm, node: str) -> None:
    slurm.boot_node(node)
    slurm.await_nodes("idle", [node])


def mend(slurm: Slurm, node: str) -> None:
    slurm.rejoin(node)
    slurm.await_nodes("idle", [node])


CAUSES = (
    Cause("rank killed", 8, kill_ranks),
    Cause("node without power", 3, lambda slurm, node: slurm.kill_node(node), reboot),
    Cause("node crashed, its connections closed", 3, lambda slurm, node: slurm.cluster.kill(node), reboot),
    Cause("cable out for good", 3, lambda slurm, node: slurm.cluster.cut(node), mend),
    Cause("cable out for 5 s", 3, pull_cable_for_5_s, restarts=False),
)


class Ordeal:
    """One training and those who strike it."""

    def __init__(self, slurm: Slurm, training: Training, draw: random.Random) -> None:
        self._slurm, self._training, self._draw = slurm, training, draw
        self._job = training.job

    def kill(self, cause: Cause) -> Kill:
        """Strike, watch how the training comes back, and put the machines in order."""
        job, node = self._job, self._draw.choice(self._job.nodes)
        restarts, launches, step = job.restarts, len(read_launches(self._training.run)), self.last_step()
        step_s = self._step_s()
        marks = [time.monotonic()]
        cause.strike(self._slurm, node)
        by_hand, resumed = False, None
        if cause.restarts:
            self._until(lambda: job.state != "RUNNING" or job.restarts > restarts, marks, f"notice: {cause.name}")
            self._until(lambda: self._is_back(restarts) or job.state in ENDED, [], "start again or end")
            if by_hand := job.state in ENDED:
                job.requeue()
            self._until(lambda: self._is_back(restarts), marks, "start again")
            self._until(lambda: len(read_launches(self._training.run)) > launches, marks, "go on")
            resumed = read_launches(self._training.run)[-1].step
        self._until(lambda: self.last_step() > step, marks, f"pass step {step}")
        parts = [after - before for before, after in pairwise(marks)] if cause.restarts else 4 * [None]
        cause.repair(self._slurm, node)
        return Kill(cause.name, node, step, resumed, *parts, marks[-1] - marks[0] - step_s, by_hand)

    def _is_back(self, restarts: int) -> bool:
        """Whether the job runs, having been started again since it had ``restarts``."""
        return self._job.restarts > restarts and self._job.state == "RUNNING"

    def last_step(self) -> int:
        """The newest whole line of steps.jsonl."""
        path = self._training.run / "steps.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            lines = stream.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for_step(self, step: int) -> None:
        self._until(lambda: self.last_step() >= step, [], f"reach step {step}")

    def _step_s(self) -> float:
        lines = self._training.steps()[-_STEP_SAMPLE:]
        return statistics.median(sum(line["phases_s"].values()) for line in lines)

    def _until(self, condition: Callable[[], bool], marks: list[float], what: str) -> None:
        self._job.wait_until(condition, LIMIT_S, what)
        marks.append(time.monotonic())


def schedule(kills: int, draw: random.Random) -> list[tuple[int, Cause]]:
    """At which step what happens: shares are those of the weights, the order is drawn."""
    total = sum(cause.weight for cause in CAUSES)
    deck = [cause for cause in CAUSES for _ in range(-(-kills * cause.weight // total))]
    draw.shuffle(deck)
    step, planned = 0, []
    for cause in deck[:kills]:
        step += draw.randint(*GAP_STEPS)
        planned.append((step, cause))
    return planned


def compare_samples(ours: dict[int, np.ndarray], undisturbed: dict[int, np.ndarray]) -> dict[str, int]:
    """How many times a sample was counted too rarely and too often, over all epochs."""
    assert ours.keys() == undisturbed.keys(), "the runs are not equally long"
    differences = [ours[epoch] - undisturbed[epoch] for epoch in ours]
    return {
        "lost": int(sum(np.maximum(-difference, 0).sum() for difference in differences)),
        "doubled": int(sum(np.maximum(difference, 0).sum() for difference in differences)),
        "counted": int(sum(counts.sum() for counts in ours.values())),
        "most_in_an_epoch": int(max(counts.max() for counts in ours.values())),
    }


def by_cause(kills: Iterable[Kill]) -> dict[str, dict[str, Any]]:
    """Medians and extremes of the times in seconds, a row a cause."""
    rows: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[Kill]] = {}
    for kill in kills:
        groups.setdefault(kill.cause, []).append(kill)
    for cause, group in groups.items():
        rows[cause] = {"kills": len(group)}
        for name in (field.name for field in fields(Kill) if field.name.endswith("_s")):
            values = [getattr(kill, name) for kill in group if getattr(kill, name) is not None]
            if values:
                rows[cause][name] = {"median": statistics.median(values), "max": max(values)}
    return rows


def torment(slurm: Slurm, plan: list[tuple[int, Cause]], draw: random.Random, scratch: Path) -> dict[str, Any]:
    """The whole comparison; ``scratch`` is a folder for the training that nothing happens to."""
    steps = plan[-1][0] + GAP_STEPS[1]
    config = digits_config(slurm, steps)
    overrides = ["data.log_samples=true", "train.epochs=1000", "train.eval_every_epochs=none"]
    started_s = time.monotonic()
    alone = train_alone(config, scratch / "alone", NODES, *overrides, limit_s=4 * LIMIT_S)
    alone_s = time.monotonic() - started_s
    print(f"{steps} steps alone took {alone_s:.0f} s", flush=True)
    patience = [*overrides, "launch.max_requeues=100000"]
    started_s = time.monotonic()
    training = submit(slurm, config, *patience, nodes=NODES, tasks=1, env={"HPCTRAIN_ENGINE": "mpi"})
    kills = strike(Ordeal(slurm, training, draw), plan)
    training.job.wait(LIMIT_S)
    wall_s = time.monotonic() - started_s
    return (
        judge(training, alone, kills)
        | {"steps": steps, "wall_s": wall_s, "alone_s": alone_s}
        | {"traffic": {host.name: host.traffic()._asdict() for host in slurm.cluster.hosts}}
    )


def strike(ordeal: Ordeal, plan: list[tuple[int, Cause]]) -> list[Kill]:
    """All of the plan, one after the other; a start is left alone until it has come past its first checkpoint."""
    kills: list[Kill] = []
    for step, cause in plan:
        ordeal.wait_for_step(max(step, (kills[-1].resumed_step or 0) + GAP_STEPS[0]) if kills else step)
        kills.append(kill := ordeal.kill(cause))
        print(f"{len(kills):3}. {cause.name} on {kill.node} at step {kill.step}: {kill.lost_s:.1f} s lost", flush=True)
    return kills


def judge(training: Training, alone: Path, kills: list[Kill]) -> dict[str, Any]:
    """What has become of the training, which is over, beside the one that nothing happened to."""
    record, facts = record_of(training.run), training.job.facts()
    bitwise = record["parameters_sha256"] == record_of(alone)["parameters_sha256"]
    samples = compare_samples(samples_seen(training.run), samples_seen(alone))
    by_hand, lost_s = sum(kill.by_hand for kill in kills), sum(kill.lost_s for kill in kills)
    completed = facts["JobState"] == "COMPLETED"
    return {
        "sentence": f"{len(kills)} kills survived, {by_hand} of them by hand; samples lost {samples['lost']}, "
        f"doubled {samples['doubled']}; parameters {'equal' if bitwise else 'differ from'} those of the undisturbed "
        f"run bit for bit; {lost_s / len(kills):.0f} s lost a kill",
        "passed": completed and bitwise and samples["lost"] == samples["doubled"] == by_hand == 0,
        "kills_survived": len(kills), "by_hand": by_hand, "bitwise_equal": bitwise, "samples": samples,
        "lost_s": lost_s, "by_cause": by_cause(kills), "launch": record["launch"],
        "launches": lines_of(training.run / LAUNCHES_FILE),
        "slurm": {key: facts[key] for key in ("JobState", "Restarts", "NodeList", "SubmitTime", "EndTime")},
        "sacct": training.job.sacct("JobIDRaw", "State", "NodeList", "Elapsed", "ExitCode"),
        "kills": [asdict(kill) for kill in kills],
    }  # fmt: skip


def main() -> int:
    options = bare_parser(__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0, help="of the order and the steps")
    asked = options.parse_args()
    if (reason := slurm_obstacle()) is not None:
        options.error(f"no Slurm can be brought up here: {reason}")
    draw = random.Random(asked.seed)
    plan = schedule(asked.kills, draw)
    provenance = Provenance([])
    with (
        Slurm(num_nodes=4, tasks_per_node=2, rate=RATE, accounting=True) as slurm,
        tempfile.TemporaryDirectory() as scratch,
    ):
        record = torment(slurm, plan, draw, Path(scratch))
    return conclude(record | {"seed": asked.seed, "rate": RATE, "provenance": provenance.to_record()}, asked.json)


if __name__ == "__main__":
    sys.exit(main())
