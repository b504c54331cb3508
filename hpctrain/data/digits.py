"""`hpctrain data digits`: the 1,797 handwritten digits that scikit-learn ships, as a packed data set.

The set is the test part of Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI): 8 x 8
pixels of 17 grey levels. Each pixel becomes a square of 4 x 4 before JPEG, because a digit that fills one
8 x 8 block of JPEG would lose its strokes; the mean over a square gives its grey level back.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from hpctrain.data.packer import PackOptions, PackResult, pack_source
from hpctrain.data.progress import Progress, no_progress
from hpctrain.data.sources import Entry, Source
from hpctrain.data.split import name_hash
from hpctrain.errors import UserError

SIDE = 32
VAL_SHARE = 0.2
_JPEG_QUALITY = 95
_LEVELS = 16


def make_digits(destination: Path, progress: Progress = no_progress) -> PackResult:
    """Pack the digits into ``destination``, unless they are there: 1,438 to train on, 359 held out.

    The folder counts as packed when it is complete, and not before. Raises UserError where scikit-learn is
    missing or the folder holds something else.
    """
    return pack_source(_digits(), destination, PackOptions(jobs=1), progress)


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is missing: pip install 'hpctrain[digits]'") from None
    bunch = load_digits()
    pictures: np.ndarray = bunch.images
    labels: np.ndarray = bunch.target
    held_out = _held_out(labels)
    entries = [
        Entry("val" if row in held_out else "train", label, f"{row:04d}", "digits", row, pictures[row].size)
        for row, label in enumerate(labels.tolist())
    ]
    classes = tuple(str(number) for number in range(10))
    return Source("digits", classes, entries, lambda entry: _jpeg(pictures[entry.offset]))


def _held_out(labels: np.ndarray) -> set[int]:
    """Rows of the validation part: the same fifth of every class, chosen by the hash of the row's number."""
    chosen: set[int] = set()
    for label in np.unique(labels).tolist():
        rows = sorted(np.flatnonzero(labels == label).tolist(), key=lambda row: name_hash("digits", str(row)))
        chosen.update(rows[: round(VAL_SHARE * len(rows))])
    return chosen


def _jpeg(picture: np.ndarray) -> bytes:
    """One digit [8, 8] with values 0 … 16 as a grey JPEG, 32 x 32."""
    grey = Image.fromarray((picture * (255 / _LEVELS)).round().astype(np.uint8))
    buffer = io.BytesIO()
    grey.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
