"""Where findings of the doctor go: as tables to people, as JSON to programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpctrain.metrics.jsonfiles import write_atomic

STANDARD_OUTPUT = Path("-")


def tell(text: str, render: Callable[[], None], json_file: Path | None) -> None:
    """Print ``text``, which is JSON, where ``json_file`` is ``-``; else ``render`` the same, and write it to the file.

    Raises MachineError when it cannot be written.
    """
    if json_file == STANDARD_OUTPUT:
        print(text, flush=True)
        return
    render()
    if json_file is not None:
        write_atomic(json_file, text.encode() + b"\n")
