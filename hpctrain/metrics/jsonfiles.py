"""JSON that any reader accepts, and files that are whole or absent: what records and logs are written with.

It knows no key of any file; those are in ``steplog`` and ``record``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import MachineError


def to_json_value(value: Any) -> Any:
    """``value`` in JSON's own types: tuples become lists, paths strings, array scalars numbers.

    NaN and the infinities, which JSON does not have, become null.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode_line(value: Any) -> bytes:
    """``value`` as one line of JSON with its newline."""
    return json.dumps(to_json_value(value), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def cannot_write(path: Path, error: OSError) -> MachineError:
    """What to raise when the system refuses a write under ``path``."""
    return MachineError(
        f"cannot write {path}: {error.strerror}; free the disk or make the folder writable, then resume the run"
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Put ``content`` into ``path``: after a crash at any moment the file is the old one or the new one.

    Raises MachineError when the system refuses; the old file, if any, is untouched then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
