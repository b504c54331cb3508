"""A rank of a competitor: `python -m hpctrain.bench.gradients.worker ADDRESS GROUP`, started by the bench.

It calls the bench, and then does what it is told: boot, enter a contest, run a block, leave.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import Any

from hpctrain.bench.gradients.launching import dying_with_parent
from hpctrain.bench.gradients.line import Caller, Message
from hpctrain.errors import HpctrainError, UserError
from hpctrain.topology.ranks import Topology, detect

#: iterations at the start of a block that are not timed
WARMUP_STEPS = 3
VERIFIED_STEPS = 3


class Rank:
    """What a rank keeps between orders; each method that is an order returns its answer."""

    def __init__(self, group: str, topology: Topology, caller: Caller) -> None:
        self._group, self._topology, self._caller = group, topology, caller
        self._place: Any = None
        self._entered: dict[str, Any] = {}
        self._step = 0

    def boot(self, order: Message) -> Message:
        """Join the group's world; the answer tells why that is impossible here, if it is."""
        from hpctrain.bench.gradients.contestants import Place, open_place
        from hpctrain.bench.gradients.delivery import Noise, Prepared, tensor_list
        from hpctrain.config.schema import Config

        config = Config.model_validate(order["config"])
        place = open_place(self._group, self._topology, config, order["limit_s"])
        if not isinstance(place, Place):
            return {"absent": place}
        self._place = place
        noise = Noise(config.seed, self._topology.rank, self._topology.world_size, place.device)
        self._prepared = Prepared.make(tensor_list(config), noise, place.device)
        return {"device": place.device_name, "versions": place.versions, "delivery_s": self._time_delivery()}

    def _time_delivery(self) -> float:
        """Seconds that handing over the gradients takes by itself, which is in every competitor's time."""
        from hpctrain.bench.gradients.delivery import Delivery

        delivery, times = Delivery(self._prepared), []
        for step in range(2 * WARMUP_STEPS + 1):
            delivery.prepare(step)
            loss = delivery()
            started = time.monotonic()
            loss.backward()
            self._place.synchronise()
            times.append(time.monotonic() - started)
        return sorted(times)[len(times) // 2]

    def enter(self, order: Message) -> Message:
        """Set a competitor up under a name, and have it exchange some steps; the answer is its worst tensor."""
        from hpctrain.bench.gradients.delivery import Delivery

        contestant = self._place.enter(Delivery(self._prepared), order["name"], order["gradients"])
        self._entered[order["name"]] = contestant
        found = []
        for _ in range(VERIFIED_STEPS):
            self._exchange(contestant)
            found.append(contestant.delivery.worst(self._step))
        error, tensor = max(found)
        return {"apart": error, "tensor": tensor, "how": contestant.how}

    def block(self, order: Message) -> Message:
        """Time exchanges: when each began and ended on this rank, by the clock of the host, and seconds of CPU."""
        contestant = self._entered[order["name"]]
        for _ in range(WARMUP_STEPS):
            self._exchange(contestant)
        rows = [self._exchange(contestant) for _ in range(order["steps"])]
        self._place.barrier()
        began, ended, cpu_s = zip(*rows, strict=True)
        return {"began": began, "ended": ended, "cpu_s": sum(cpu_s)}

    def _exchange(self, contestant: Any) -> tuple[float, float, float]:
        self._caller.beat()
        self._step += 1
        contestant.delivery.prepare(self._step)
        loss = contestant.forward()
        self._place.synchronise()
        self._place.barrier()
        began, began_cpu = time.monotonic(), time.process_time()
        contestant.finish(loss)
        self._place.synchronise()
        return began, time.monotonic(), time.process_time() - began_cpu

    def withdraw(self, order: Message) -> Message:
        """Forget a competitor and free its memory."""
        self._entered.pop(order["name"]).close()
        return {}

    def leave(self, order: Message) -> Message:
        """Leave the group's world."""
        for contestant in self._entered.values():
            contestant.close()
        if self._place is not None:
            self._place.close()
        return {}


def serve(rank: Rank, caller: Caller) -> None:
    """Obey until told to leave."""
    orders = {"boot": rank.boot, "enter": rank.enter, "block": rank.block, "withdraw": rank.withdraw}
    while (order := caller.next_order())["do"] != "leave":
        try:
            answer = orders[order["do"]](order)
        except HpctrainError as error:
            answer = {"error": "user" if isinstance(error, UserError) else "machine", "text": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": "program", "text": f"{type(error).__name__}: {error}"}
        caller.answer(answer)
    caller.answer(rank.leave(order))


def main() -> None:
    address, group = sys.argv[1:]
    # The bench's death wakes nobody who is stopped, but it kills mpirun, and mpirun's death kills this process.
    dying_with_parent(signal.SIGKILL)()
    caller = Caller(address)
    topology = detect(os.environ)
    caller.answer({"group": group, "rank": topology.rank})
    serve(Rank(group, topology, caller), caller)


if __name__ == "__main__":
    main()
