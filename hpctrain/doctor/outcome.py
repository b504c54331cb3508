"""Where findings of the doctor go: as tables to people, as JSON to programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpctrain.metrics.jsonfiles import to_text, write_json

STANDARD_OUTPUT = Path("-")


def tell(record: Any, render: Callable[[], None], json_file: Path | None) -> None:
    """Print ``record`` as JSON where ``json_file`` is ``-``; else ``render`` the same, and write it to the file.

    Raises MachineError when it cannot be written.
    """
    if json_file == STANDARD_OUTPUT:
        print(to_text(record), end="", flush=True)
        return
    render()
    if json_file is not None:
        write_json(json_file, record)
