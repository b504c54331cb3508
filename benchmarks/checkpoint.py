"""What a checkpoint of a 100 MB model costs a run: how long training stands still, and how far it is slowed after.

    python -m benchmarks.checkpoint --rounds 8 --json checkpoint.json

One process, `hpctrain train`'s own loop and saver on made-up pictures. First a checkpoint written beside the steps is
compared with a synchronous one, to the last bit. A round is a block of undisturbed steps, a save, and steps until it is
written. ``exposed_s`` is the time for which the loop stood still, ``slowed_s`` what the steps beside the write took
longer than undisturbed ones, ``turn_us`` what a step pays for being stoppable. The bar: exposed at most 20 % of the
write.
"""

from __future__ import annotations

import filecmp
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ranks import conclude, parser
from benchmarks.timing import seconds_of
from hpctrain.bench.variants import make_loop
from hpctrain.comm.turns import Turns
from hpctrain.config.schema import Config
from hpctrain.metrics.layout import checkpoint_name
from hpctrain.metrics.provenance import Provenance
from hpctrain.topology.ranks import Topology
from hpctrain.train.build import build_parts, open_data, plan_for
from hpctrain.train.checkpoint import save_checkpoint
from hpctrain.train.loop import Loop
from hpctrain.train.resume import capture
from hpctrain.train.session import never, open_session

BAR = 0.2
_UNDISTURBED = 20
_TURNS = 100_000


def configuration(device: str, neurons: int) -> Config:
    """A dense net on pictures of 32 x 32: 25.4 million parameters with 3,400 neurons; no momentum, so that the
    checkpoint is the model."""
    return Config.model_validate(
        {
            "model": {"name": "dense", "hidden_layers": 2, "neurons": neurons},
            "data": {"loader": "synthetic", "image_size": 32, "num_classes": 1000, "synthetic_samples": 1 << 20},
            "train": {"batch_per_worker": 32, "epochs": 1, "device": device},
            "optimizer": {"momentum": 0.0},
            "comm": {"engine": "serial"},
            "log": {"every_steps": 1000, "tensorboard": False},
            "checkpoint": {"keep": 1},
        }
    )


def verify(loop: Loop, reference: Path) -> None:
    """Raise AssertionError unless a checkpoint written beside the steps has the bits of a synchronous one."""
    loop.step()
    loop.save()
    synchronous = save_checkpoint(reference, capture(loop.parts, loop.progress), 1)
    for _ in range(3):
        loop.step()
    loop.saver.wait()
    written = loop.run.checkpoints / synchronous.name
    names = sorted(path.name for path in synchronous.iterdir())
    _, different, missing = filecmp.cmpfiles(written, synchronous, names, shallow=False)
    assert not different and not missing, f"{synchronous.name} differs in {different + missing}"


def measure_round(loop: Loop) -> dict[str, float]:
    """Seconds of one save and of what it does to the steps beside it."""
    step_s = statistics.median(seconds_of(loop.step) for _ in range(_UNDISTURBED))
    written = loop.run.checkpoints / checkpoint_name(loop.progress.step)
    exposed_s = seconds_of(loop.save)
    started_s, steps = time.perf_counter(), 0
    while not written.exists():
        loop.step()
        steps += 1
    beside_s = time.perf_counter() - started_s
    loop.saver.wait()
    write_s = loop.saver.writes_s[-1]
    return {
        "step_s": step_s,
        "exposed_s": exposed_s,
        "write_s": write_s,
        "steps_beside": steps,
        "slowed_s": beside_s - steps * step_s,
        "exposed_share": exposed_s / write_s,
    }


def turn_us() -> float:
    """What a step pays for being stoppable, on one of two ranks that nobody has asked."""
    nobody: Any = None
    turns = Turns(nobody, Topology(world_size=2), never)
    return seconds_of(lambda: [turns.begin() for _ in range(_TURNS)]) / _TURNS * 1e6


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """The whole record."""
    provenance = Provenance([])
    with open_session(config.comm, config.train.device) as session, tempfile.TemporaryDirectory() as folder:
        dataset = open_data(session.comm, config)
        parts = build_parts(config, plan_for(config, dataset, session.comm.topology), session)
        loop = make_loop(parts, dataset, session, Path(folder))
        verify(loop, Path(folder) / "reference")
        samples = [measure_round(loop) for _ in range(rounds)]
        model_bytes = sum(parameter.nbytes for parameter in parts.model.parameters())
    share = statistics.median(sample["exposed_share"] for sample in samples)
    return {
        "sentence": f"training stands still for {share:.1%} of the write of {model_bytes / 1e6:.0f} MB (median of "
        f"{rounds} rounds); the file has the bits of a synchronous one",
        "passed": share <= BAR,
        "bar": BAR,
        "bitwise_equal": True,
        "exposed_share": share,
        "model_bytes": model_bytes,
        "turn_us": turn_us(),
        "samples": samples,
        "provenance": provenance.to_record(),
    }


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--neurons", type=int, default=3400)
    asked = options.parse_args()
    record = measure(configuration(asked.device, asked.neurons), asked.rounds)
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
