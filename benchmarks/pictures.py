"""A small image folder out of thin air, for machines that have no data: smooth blobs, whose colour is their class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 4
_SIDE = 48


def make_pictures(folder: Path, per_class: int = 80) -> Path:
    """Write ``folder``/{train,val}/CLASS/*.jpg, a quarter as many for validation; returns ``folder``."""
    generator = np.random.default_rng(1)
    for part, count in (("train", per_class), ("val", per_class // 4)):
        for label in range(CLASSES):
            here = folder / part / f"class-{label}"
            here.mkdir(parents=True)
            for number in range(count):
                coarse = generator.integers(0, 128, (4, 4, 3), dtype=np.uint8)
                coarse[..., label % 3] += np.uint8(60 + 30 * (label // 3))
                picture = Image.fromarray(coarse).resize((_SIDE + number % 16, _SIDE), Image.Resampling.BICUBIC)
                picture.save(here / f"{number:04}.jpg", quality=90)
    return folder
