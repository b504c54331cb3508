"""One summary.json out of what the parts of gpu_suite.sh left in a folder.

    python -m benchmarks.summarise FOLDER DEVICE

``FOLDER/parts.tsv`` has a line a part: name, status, seconds, note. A part's own JSON lies beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpctrain.metrics.provenance import Provenance


def part(folder: Path, line: str) -> dict[str, Any]:
    """What became of one part; its sentence where its JSON has one."""
    name, status, seconds, note = line.rstrip("\n").split("\t")
    result = folder / f"{name}.json"
    row = {"part": name, "status": status, "seconds": int(seconds), "note": note, "json": None, "sentence": None}
    try:
        found = json.loads(result.read_text())
    except (OSError, ValueError):
        return row
    return {**row, "json": result.name, "sentence": found.get("sentence") if isinstance(found, dict) else None}


def main() -> int:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    rows = [part(folder, line) for line in (folder / "parts.tsv").read_text().splitlines()]
    summary = {
        "device": device,
        "passed": bool(rows) and all(row["status"] == "passed" for row in rows),
        "parts": rows,
        "provenance": Provenance([]).to_record(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for row in rows:
        words = row["sentence"] or row["note"]
        print(f"{row['status']:8} {row['seconds']:5} s  {row['part']:14} {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
