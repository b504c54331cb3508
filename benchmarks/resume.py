"""Whether a run that goes on from a checkpoint ends where one without a break does, on a CPU or a GPU.

    python -m benchmarks.resume --device cuda --json resume.json

Two runs of 20 steps show whether runs repeat at all; the third stops after 10 steps and goes on to 20. torch is
asked for deterministic algorithms. Where the first two differ, the third may differ no more than ten times as much.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.pictures import make_pictures
from benchmarks.ranks import TAIL_CHARACTERS, conclude, hpctrain, parser
from hpctrain.metrics.layout import list_checkpoints
from hpctrain.metrics.provenance import Provenance
from hpctrain.train.checkpoint import load_checkpoint

STEPS = 20


class Runs:
    """Runs in one folder, of one configuration."""

    def __init__(self, folder: Path, device: str, precision: str, limit_s: float) -> None:
        self._folder, self._device, self._deadline = folder, device, time.monotonic() + limit_s
        keys = {
            "data.path": make_pictures(folder / "pictures"),
            "train.device": device,
            "train.precision": precision,
            "train.epochs": 5,
            "checkpoint.every_steps": STEPS // 2,
            "log.every_steps": 5,
        }
        self._keys = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]

    def train(self, name: str, steps: int, resumed: bool = False) -> None:
        """Train the run ``name`` up to ``steps``; RuntimeError with its output when it fails, or does not resume."""
        argv = ["train", "benchmarks/small.yaml", "--run-dir", str(self._folder / name), *self._keys]
        argv += ["--set", f"train.max_steps={steps}"]
        done = hpctrain("serial", 1, self._device, argv, self._deadline - time.monotonic(), exact=True)
        if done.returncode != 0 or ("going on from step" in done.output) != resumed:
            raise RuntimeError(done.output[-TAIL_CHARACTERS:])

    def weights(self, name: str) -> torch.Tensor:
        """All numbers of the model at the end of the run, as one vector [n] float64."""
        newest = list_checkpoints(self._folder / name / "checkpoints")[0]
        model = load_checkpoint(newest).tensors["model"]
        return torch.cat([model[key].double().reshape(-1).cpu() for key in sorted(model)])


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--precision", default="fp32")
    asked = options.parse_args()
    provenance = Provenance([])
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name), asked.device, asked.precision, asked.limit_s)
        runs.train("whole", STEPS)
        runs.train("again", STEPS)
        runs.train("resumed", STEPS // 2)
        runs.train("resumed", STEPS, resumed=True)
        whole, again, resumed = (runs.weights(run) for run in ("whole", "again", "resumed"))
    scale = float(whole.norm())
    repeated, apart = float((whole - again).norm()) / scale, float((whole - resumed).norm()) / scale
    passed = apart <= 10 * repeated
    record = {
        "passed": passed,
        "sentence": f"10 + 10 steps end {apart:.2g} from where 20 end, and 20 again {repeated:.2g} (relative, norm)",
        "device": asked.device,
        "precision": asked.precision,
        "relative_difference": {"resumed": apart, "repeated": repeated},
        "bitwise": {"resumed": torch.equal(whole, resumed), "repeated": torch.equal(whole, again)},
        "provenance": provenance.to_record(),
    }
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
