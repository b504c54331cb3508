"""Whether memory of a training process grows with the steps: a small net on real JPEGs, thousands of steps.

    python -m benchmarks.memory --steps 2000 --ranks 2 --json memory.json

The run is `hpctrain train` on scikit-learn's digits (``--made``: on pictures made up here); resident memory is that
of rank 0 at every logged step. The slope is a least-squares fit over the second half of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pictures import make_pictures
from benchmarks.ranks import TAIL_CHARACTERS, conclude, hpctrain, parser

_MIB = 1 << 20
_EVERY = 5
#: four logged steps
_FEWEST = 4 * _EVERY


def settings(folder: Path, steps: int, made: bool, loader: str, device: str) -> tuple[str, list[str]]:
    """The configuration and what is set over it."""
    if made:
        config, data = "benchmarks/small.yaml", make_pictures(folder / "pictures")
    else:
        config, data = "configs/quickstart.yaml", folder / "digits"
    keys = {
        "data.path": data,
        "data.loader": loader,
        "train.epochs": steps,
        "train.max_steps": steps,
        "train.eval_every_epochs": 20,
        "train.device": device,
        "checkpoint.every_steps": max(1, steps // 4),
        "log.every_steps": _EVERY,
    }
    return config, [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def describe(run: Path) -> dict[str, Any]:
    """Figures of a run that has ended."""
    record = json.loads((run / "record.json").read_text())
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    quarters = [lines[len(lines) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
    system, slope = record["system"], record["system"]["memory_slope_bytes_per_step"]
    return {
        "sentence": f"rank 0 grows by {slope:.0f} bytes a step over the second half of {record['steps']} steps, "
        f"{system['rss_peak_bytes'] / _MIB:.0f} MiB at most",
        "memory_slope_bytes_per_step": slope,
        "rss_peak_bytes": system["rss_peak_bytes"],
        "rss_bytes_at_step": {line["step"]: line["rss_bytes"] for line in quarters},
        "gpu_peak_bytes": lines[-1].get("gpu_peak_bytes"),
        "steps": record["steps"],
        "loader": record["data"]["loader"],
        "engine": record["engine"]["name"],
        "plan": record["plan"],
        "provenance": record["provenance"],
    }


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--engine", default="horovod")
    options.add_argument("--loader", default="dali")
    options.add_argument("--made", action="store_true", help="pictures made up here instead of digits")
    asked = options.parse_args()
    if asked.steps < _FEWEST:
        options.error(f"a slope needs at least {_FEWEST} steps")
    with tempfile.TemporaryDirectory() as name:
        config, keys = settings(Path(name), asked.steps, asked.made, asked.loader, asked.device)
        argv = ["train", config, "--run-dir", f"{name}/run", *keys]
        done = hpctrain(asked.engine, asked.ranks, asked.device, argv, asked.limit_s)
        if done.returncode != 0:
            print(done.output[-TAIL_CHARACTERS:])
            return 1
        record = describe(Path(name) / "run")
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
