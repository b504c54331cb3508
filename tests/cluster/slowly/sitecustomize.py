"""A slow disk, for every Python that has this folder on its path: what is flushed of a checkpoint that has not got its
name yet takes at least as many seconds as the file HPCTRAIN_TEST_DELAY says meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

_flush = os.fsync


def _flush_slowly(descriptor: int) -> None:
    if "/checkpoints/.step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        began = time.monotonic()
        while time.monotonic() - began < float(Path(os.environ["HPCTRAIN_TEST_DELAY"]).read_text()):
            time.sleep(0.05)
    _flush(descriptor)


os.fsync = _flush_slowly  # type: ignore[assignment]
