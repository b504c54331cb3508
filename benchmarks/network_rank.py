"""What one rank does for ``benchmarks.network``: exchanges of a net's gradients by one competitor, in several settings.

It reports, for each setting, how far the means are from the true ones, when each exchange began and ended, and what
its host's card sent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpctrain.bench.gradients.contestants import Contestant, Place, backward, open_place
from hpctrain.bench.gradients.delivery import Delivery, Noise, Prepared, tensor_list
from hpctrain.config.load import load_config
from hpctrain.errors import UserError
from hpctrain.topology.ranks import detect
from tests.parallel.launch import report

_SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
_LIMIT_S = 120.0
#: exchanges before those that are timed; the first is verified
_WARMUP_STEPS = 2

Row = dict[str, Any]


def pause_between(delivery: Delivery, compute_s: float) -> None:
    """Stand-in for compute: let the backward pass take ``compute_s`` more, the same before each gradient.

    It sleeps, as a host does whose GPU computes; real compute would measure how hosts share this machine's cores.
    """
    pause_s = compute_s / len(delivery.ordered)

    def wait(_: Tensor) -> None:
        time.sleep(pause_s)

    for parameter in delivery.ordered:
        parameter.register_hook(wait)


def exchange(place: Place, contestant: Contestant) -> tuple[float, float]:
    """When one exchange began and ended here; the gradients are those of the last time."""
    for parameter in contestant.delivery.ordered:
        parameter.grad = None
    loss = contestant.forward()
    place.barrier()
    began = time.monotonic()
    contestant.finish(loss)
    return began, time.monotonic()


def timed(place: Place, contestant: Contestant, steps: int) -> Row:
    """``steps`` exchanges, and the bytes that the card sent for each, those of a barrier included."""
    rows, before = [], int(_SENT.read_text())
    for _ in range(steps):
        rows.append(exchange(place, contestant))
    sent = int(_SENT.read_text()) - before
    began, ended = zip(*rows, strict=True)
    return {"began": began, "ended": ended, "sent_bytes": sent / steps}


def measure(place: Place, prepared: Prepared, setting: Mapping[str, str], steps: int) -> Row:
    """A setting: alone, and then behind compute that takes as long as it did alone."""
    delivery = Delivery(prepared)
    contestant = place.enter(delivery, "-".join(setting.values()), setting | {"bucket_mib": 16.0})
    delivery.prepare(0)
    contestant.finish(contestant.forward())
    apart, tensor = delivery.worst(0)
    for _ in range(_WARMUP_STEPS - 1):
        exchange(place, contestant)
    alone = timed(place, contestant, steps)
    compute_s = sum(end - begin for begin, end in zip(alone["began"], alone["ended"], strict=True)) / steps
    pause_between(delivery, compute_s)
    hidden = timed(place, contestant, steps)
    contestant.close()
    return {"apart": apart, "tensor": tensor, "alone": alone, "hidden": hidden, "compute_s": bare(prepared, compute_s)}


def bare(prepared: Prepared, compute_s: float) -> float:
    """Seconds of a backward pass with that compute and without an exchange."""
    delivery = Delivery(prepared)
    pause_between(delivery, compute_s)
    loss = delivery()
    started = time.monotonic()
    backward(loss)
    return time.monotonic() - started


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    topology = detect(os.environ)
    config = load_config(None, [f"model.name={task['model']}", "train.device=cpu"])
    place = open_place(task["group"], topology, config, _LIMIT_S)
    if isinstance(place, str):
        report({"absent": place})
        return
    noise = Noise(config.seed, topology.rank, topology.world_size, place.device)
    prepared = Prepared.make(tensor_list(config), noise, place.device)
    rows: list[Row] = []
    for setting in task["settings"]:
        try:
            rows.append(measure(place, prepared, setting, task["steps"]))
        except UserError as error:
            rows.append({"absent": str(error)})
    elements = sum(value.numel() for value in prepared.values)
    report({"host": topology.host, "elements": elements, "versions": place.versions, "rows": rows})
    place.close()


if __name__ == "__main__":
    main()
