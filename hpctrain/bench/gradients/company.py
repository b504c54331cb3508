"""All competitors at once: started together, booted one after another, and ended whatever happens."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpctrain.bench.gradients.crew import Crew
from hpctrain.bench.gradients.groups import Group
from hpctrain.bench.gradients.launching import missing_launcher
from hpctrain.bench.gradients.line import Listener, Message
from hpctrain.config.schema import Config
from hpctrain.errors import UserError

_POLL_S = 0.2
#: how long processes may take to end, each time they are told
_FAREWELL_S = 5.0


class Company:
    """The crews that are here, by name, and what their ranks 0 told of themselves; of others the reason why not."""

    def __init__(self, ranks: int, limit_s: float) -> None:
        self.ranks = ranks
        self.crews: dict[str, Crew] = {}
        self.told: dict[str, Message] = {}
        self.absent: dict[str, str] = {}
        self._started: list[Crew] = []
        self._limit_s = limit_s

    def start(self, groups: Sequence[Group], listener: Listener, folder: Path) -> None:
        """Start the processes of all ``groups`` and wait until they have called."""
        for group in groups:
            if reason := missing_launcher(group):
                self.absent[group.name] = reason
            else:
                self._started.append(Crew(group, self.ranks, listener.address, folder))
        deadline = time.monotonic() + self._limit_s
        while incomplete := [crew for crew in self._started if not crew.is_complete]:
            call = listener.accept(_POLL_S)
            if call is not None:
                hello = call.read_one(deadline)
                next(crew for crew in self._started if crew.group.name == hello["group"]).admit(hello["rank"], call)
            for crew in incomplete:
                crew.check_start(self._limit_s if time.monotonic() > deadline else None)

    def boot(self, config: Config) -> None:
        """Have every group join its world. One that cannot is absent, with its reason."""
        order = {"do": "boot", "config": config.model_dump(mode="json"), "limit_s": self._limit_s}
        for crew in self._started:
            with crew.awake():
                try:
                    told = crew.ask(order, self._limit_s)[0]
                except UserError as error:
                    told = {"absent": str(error)}
            if "absent" in told:
                self.absent[crew.group.name] = told["absent"]
            else:
                self.crews[crew.group.name], self.told[crew.group.name] = crew, told

    def end(self) -> None:
        """End all processes: in order, then by the system's signal, then by force."""
        for crew in self._started:
            crew.leave()
        staying = _still_there(self._started)
        for crew in staying:
            crew.terminate()
        _still_there(staying)
        for crew in self._started:
            crew.kill()


def _still_there(crews: Sequence[Crew]) -> list[Crew]:
    deadline = time.monotonic() + _FAREWELL_S
    return [crew for crew in crews if not crew.has_ended(deadline)]


@contextmanager
def gathered(groups: Sequence[Group], ranks: int, config: Config) -> Iterator[Company]:
    """The competitors for the time of the block; no process of theirs is left after it.

    Raises MachineError, which names the group, when one fails at its start.
    """
    company = Company(ranks, config.comm.startup_timeout_s)
    listener = Listener(f"hpctrain-{secrets.token_hex(8)}")
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as folder:
        try:
            company.start(groups, listener, Path(folder))
            company.boot(config)
            yield company
        finally:
            company.end()
            listener.close()
