"""A slow disk, for every Python that has this folder on its path: what is flushed below `checkpoints` takes longer by
as many seconds as the file HPCTRAIN_TEST_DELAY says then."""

from __future__ import annotations

import os
import time
from pathlib import Path

_flush = os.fsync


def _flush_slowly(descriptor: int) -> None:
    if "/checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(float(Path(os.environ["HPCTRAIN_TEST_DELAY"]).read_text()))
    _flush(descriptor)


os.fsync = _flush_slowly  # type: ignore[assignment]
