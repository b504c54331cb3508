"""JSON that any reader accepts, files that are whole or absent, and logs whose flushed lines survive a crash: what
records and logs are written with.

It knows no key of any file; those are in ``steplog`` and ``record``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import MachineError, UserError

_BLOCK_BYTES = 1 << 16


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
    return MachineError(f"cannot write {path}: {error.strerror}; free the disk or make the folder writable")


def cannot_log(path: Path, error: OSError) -> MachineError:
    """The same for a log of a run that is under way."""
    return MachineError(f"{cannot_write(path, error)}, then resume the run")


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


def to_text(value: Any) -> str:
    """``value`` as a file of JSON for people too; figures that are not finite are null in it."""
    return json.dumps(to_json_value(value), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Put ``to_text(value)`` into ``path``; as ``write_atomic``."""
    write_atomic(path, to_text(value).encode())


class DurableLog:
    """Appends lines of JSON to ``path``, after what is there; a torn last line is cut off first.

    Every method raises MachineError when the system refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab")
            self._stream.truncate(_whole_lines_bytes(path))
        except OSError as error:
            raise cannot_log(path, error) from error

    def append(self, value: Any) -> None:
        """Add a line, which a crash may take until it was flushed."""
        try:
            self._stream.write(encode_line(value))
        except OSError as error:
            raise cannot_log(self._path, error) from error

    def flush(self) -> None:
        """Return when all lines are on the disk."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise cannot_log(self._path, error) from error

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        try:
            self._stream.close()
        except OSError as error:
            raise cannot_log(self._path, error) from error


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in ``path``, one a line, in order and one in memory at a time; a last line without its end, torn by
    a kill, is left out.

    Raises UserError when the file cannot be read or a line is no object.
    """
    number = 0
    try:
        with path.open("rb") as stream:
            for row in stream:
                number += 1
                if row.endswith(b"\n"):
                    yield _object(row)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a run that wrote it") from error
    except ValueError as error:
        raise UserError(
            f"line {number} of {path} is damaged; restore the file from a copy, or delete that line"
        ) from error


def read_log_if_any(path: Path) -> list[dict[str, Any]]:
    """All lines of ``read_log``, in memory; none where there is no such file."""
    return list(read_log(path)) if path.exists() else []


def _object(row: bytes) -> dict[str, Any]:
    value = json.loads(row)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _whole_lines_bytes(path: Path) -> int:
    """Bytes up to and with the last newline."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        while size:
            start = max(0, size - _BLOCK_BYTES)
            stream.seek(start)
            newline = stream.read(size - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            size = start
    return 0
