"""Does the format on the wire cost accuracy? The same training with several seeds in each format, from first to last.

    python -m benchmarks.seeds configs/cifar10.yaml --set data.path=DIR --set train.epochs=3 --json seeds.json

Runs of the formats take turns. Passed: the means of two formats are no further apart than the best and the worst seed
of the first format are. Exits 1 when they are, or when a run fails.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ranks import TAIL_CHARACTERS, conclude, hpctrain, parser
from hpctrain.metrics.provenance import Provenance


def train(asked: Any, compression: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run: its accuracy, and what its record says of the wire."""
    sets = [*asked.set, f"gradients.compression={compression}", f"seed={seed}"]
    argv = ["train", asked.config, "--run-dir", str(folder), *(part for one in sets for part in ("--set", one))]
    done = hpctrain(asked.engine, asked.ranks, asked.device, argv, asked.limit_s)
    if done.returncode or not (folder / "record.json").exists():
        raise SystemExit(f"{compression} with seed {seed} failed:\n{done.output[-TAIL_CHARACTERS:]}")
    record = json.loads((folder / "record.json").read_text())
    row = {
        "compression": compression,
        "seed": seed,
        "top1": record["accuracy"]["top1"],
        "seen": record["accuracy"]["seen"],
    }
    print(f"{compression} seed {seed}: top-1 {row['top1']:.4f} after {done.wall_s / 60:.1f} min", flush=True)
    return row | {"wire": record["wire"], "plan": record["plan"], "wall_s": round(done.wall_s, 1)}


def judge(rows: list[dict[str, Any]], formats: list[str]) -> dict[str, Any]:
    """Means and ranges of each format, and whether the others' means lie within the first one's range of its mean."""
    top1 = {name: [row["top1"] for row in rows if row["compression"] == name] for name in formats}
    means = {name: statistics.mean(values) for name, values in top1.items()}
    spread = max(top1[formats[0]]) - min(top1[formats[0]])
    apart = {name: means[name] - means[formats[0]] for name in formats[1:]}
    passed = all(abs(difference) <= spread for difference in apart.values())
    told = "; ".join(f"{name} {means[name]:.4f} ({min(found):.4f} to {max(found):.4f})" for name, found in top1.items())
    return {"passed": passed, "means": means, "spread": spread, "apart": apart, "sentence": f"top-1: {told}"}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("config")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--engine", default="horovod")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--formats", nargs="+", default=["none", "fp16"])
    asked = options.parse_args()
    started, provenance = time.monotonic(), Provenance([])
    with tempfile.TemporaryDirectory(prefix="hpctrain-seeds-") as folder:
        rows = [
            train(asked, compression, seed, Path(folder, f"{compression}-{seed}"))
            for seed in range(1, asked.seeds + 1)
            for compression in asked.formats
        ]
    record = {
        **judge(rows, asked.formats),
        "config": asked.config,
        # A data set lies elsewhere on every machine.
        "overrides": [one for one in asked.set if not one.startswith("data.path=")],
        "minutes": round((time.monotonic() - started) / 60, 1),
        "runs": rows,
        "provenance": provenance.to_record(),
    }
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
