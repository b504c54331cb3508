"""`hpctrain bench gradients`: a whole exchange of a net's gradients, ours against the peers', in one run.

Each competitor lives in processes of its own and only one of them runs at a time. All are verified before any is
timed. Time runs from the moment when the last rank begins its backward pass to the one when the last rank has the
mean of every gradient; what the backward pass itself computes is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.bench.blocks import Sample, ratios
from hpctrain.bench.gradients.company import Company
from hpctrain.bench.gradients.delivery import tensor_list
from hpctrain.bench.gradients.groups import OURS
from hpctrain.bench.gradients.line import Message
from hpctrain.config.schema import Config
from hpctrain.errors import MachineError, UserError

#: Largest relative error, norm-wise, of a tensor's mean, by its format on the wire. A single rounding to fp16 is off
#: by 3e-4, one to bf16 by 2e-3; an exchange has two to four of them at a few ranks.
TOLERANCE = {"none": 1e-5, "fp16": 5e-3, "fp16_ef": 5e-3, "bf16": 2e-2}

#: what is compared, by the name in the record: its narrow formats, and fp32
FORMATS = ("fp16", "fp32")


@dataclass(frozen=True, slots=True)
class Contest:
    """A competitor in one of ``FORMATS``."""

    name: str
    format: str


Samples = dict[Contest, list[Sample]]


class Bench:
    """The measurements of one run, over competitors that have booted."""

    def __init__(self, config: Config, company: Company) -> None:
        self.config = config
        self.company = company
        self.ours = choose_ours(config.comm.engine, company)
        self.unavailable = dict(company.absent)
        self.verified: dict[Contest, Message] = {}

    def settings_of(self, contest: Contest) -> dict[str, Any]:
        """The section `gradients` as the competitor is to take it."""
        return self.config.gradients.model_dump(mode="json") | {"compression": self.compression_of(contest)}

    def compression_of(self, contest: Contest) -> str:
        """Ours takes the configured narrow format, fp16 if that is none; the peers know fp16 only."""
        if contest.format == "fp32":
            return "none"
        asked = str(self.config.gradients.compression)
        return asked if asked != "none" and contest.name in {group.name for group in OURS} else "fp16"

    def verify_all(self) -> list[Contest]:
        """Set up and verify every competitor in every format; those that can take part.

        Raises MachineError that names competitor and tensor when a mean is wrong, UserError when ours cannot run.
        """
        entered = []
        for contest in (Contest(name, form) for name in self.company.crews for form in FORMATS):
            try:
                self.verified[contest] = self.enter(contest.name, contest.format, self.settings_of(contest))
            except UserError as error:
                if contest.name == self.ours:
                    raise
                self.unavailable[f"{contest.name} in {contest.format}"] = str(error)
            else:
                entered.append(contest)
        return entered

    def enter(self, name: str, label: str, settings: Mapping[str, Any]) -> Message:
        """Have competitor ``name`` set itself up as ``label``; what it says of its worst tensor, which is tolerable."""
        # The first step may take longer than others, as at the start of a run.
        limit_s = max(self.config.comm.timeout_s, self.config.comm.startup_timeout_s)
        answers = self.ask(name, {"do": "enter", "name": label, "gradients": dict(settings)}, limit_s)
        worst = max(answers, key=lambda answer: float(answer["apart"]))
        check(f"{name} ({label})", worst["tensor"], worst["apart"], TOLERANCE[settings["compression"]])
        return worst

    def block(self, name: str, label: str) -> Sample:
        """One block of competitor ``name``, entered as ``label``."""
        steps = self.config.log.every_steps
        return sample_of(self.ask(name, {"do": "block", "name": label, "steps": steps}), steps)

    def ask(self, name: str, order: Mapping[str, Any], limit_s: float | None = None) -> list[Message]:
        """Wake a competitor, have it obey, and let it sleep again."""
        crew = self.company.crews[name]
        with crew.awake():
            return crew.ask(order, limit_s or self.config.comm.timeout_s)

    def run(self, contests: Sequence[Contest], rounds: int, on_round: Callable[[int], None]) -> Samples:
        """A sample a round of each contest, in an order that changes with the rounds."""
        samples: Samples = {contest: [] for contest in contests}
        generator = random.Random(self.config.seed)
        for number in range(rounds):
            for contest in generator.sample(contests, len(contests)):
                samples[contest].append(self.block(contest.name, contest.format))
            on_round(number + 1)
        return samples


def choose_ours(engine: str, company: Company) -> str:
    """Our group that peers are compared with: over the configured engine, or over the first that auto would take.

    Raises UserError when there is none.
    """
    for group in OURS:
        if group.name in company.crews and engine in ("auto", group.engine):
            return group.name
    reasons = "; ".join(f"{group.name}: {company.absent.get(group.name, 'another engine')}" for group in OURS)
    raise UserError(
        f"comm.engine={engine} gives no exchange of ours to compare with ({reasons}): see `hpctrain doctor`"
    )


def check(competitor: str, tensor: str, apart: float, tolerance: float) -> None:
    """Raise MachineError when a tensor's mean is further from the true one than its format explains."""
    # Written so that NaN fails too.
    if not apart <= tolerance:
        how = f"off by {apart:.2g} of its norm" if math.isfinite(apart) else "missing or not finite"
        raise MachineError(f"{competitor} is wrong: the mean of {tensor} is {how}, more than {tolerance:g}")


def sample_of(answers: Sequence[Message], steps: int) -> Sample:
    """The mean exchange of a block: each from the last rank's beginning to the last rank's end."""
    began = [max(times) for times in zip(*(answer["began"] for answer in answers), strict=True)]
    ended = [max(times) for times in zip(*(answer["ended"] for answer in answers), strict=True)]
    spent_s = sum(end - begin for begin, end in zip(began, ended, strict=True))
    return Sample(spent_s / steps, sum(answer["cpu_s"] for answer in answers) / steps)


def ratios_to_ours(samples: Samples, ours: str, form: str, keys: Mapping[str, str]) -> dict[str, list[float]]:
    """By key, each round's time of that peer over our time; ``keys`` has the peers' names."""
    base = samples.get(Contest(ours, form))
    if base is None:
        return {}
    return {
        key: ratios(samples[Contest(name, form)], base) for key, name in keys.items() if Contest(name, form) in samples
    }


def describe_settings(bench: Bench, rounds: int) -> dict[str, Any]:
    """What was measured, and how."""
    config, company = bench.config, bench.company
    tensors = tensor_list(config)
    elements = sum(math.prod(shape) for _, shape in tensors)
    ours = company.told[bench.ours]
    return {
        "model": config.model.model_dump(mode="json"),
        "tensors": len(tensors),
        "elements": elements,
        "bytes_fp32": 4 * elements,
        "ranks": company.ranks,
        "device": ours["device"],
        "delivery_s": {name: told["delivery_s"] for name, told in company.told.items()},
        "gradients": config.gradients.model_dump(mode="json"),
        "compression_of_ours": bench.compression_of(Contest(bench.ours, "fp16")),
        "rounds": rounds,
        "steps_per_block": config.log.every_steps,
        "seed": config.seed,
        "rule": "each round runs one block of each competitor and format, in random order; ratios are taken within "
        "rounds; a sample is the mean over a block, from the last rank's begin to the last rank's end",
    }
