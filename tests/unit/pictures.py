"""Small picture sets that tests make themselves: noise over gradients, in any size, format and orientation."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from hpctrain.data.index import RECORD, Index

_ORIENTATION_TAG = 0x0112


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A colour picture with gradients that tell left from right and top from bottom, and some noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 128 + 80 * np.sin(x / 9.0) * np.cos(y / 13.0)
    pixels = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), waves], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, orientation: int = 1, image_format: str = "JPEG") -> bytes:
    """``image`` as a file, stored as it is and marked as to be turned by ``orientation``."""
    exif = Image.Exif()
    if orientation != 1:
        exif[_ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    image.save(buffer, image_format, exif=exif.tobytes(), **({"quality": 92} if image_format == "JPEG" else {}))
    return buffer.getvalue()


def index_of(folder: Path, files: list[bytes], num_classes: int = 3) -> Index:
    """Writes ``files`` into ``folder`` and indexes them; what cannot be opened is indexed as 64 x 48."""
    samples = np.zeros(len(files), RECORD)
    shards = []
    for number, data in enumerate(files):
        path = folder / f"{number:04}.jpg"
        path.write_bytes(data)
        shards.append(os.fspath(path))
        width, height, orientation = 64, 48, 1
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        except OSError:
            pass
        if orientation >= 5:
            width, height = height, width
        samples[number] = (number, 0, len(data), number % num_classes, width, height, orientation)
    return Index(samples, tuple(shards), tuple(str(label) for label in range(num_classes)))


def picture_set(folder: Path, count: int = 24) -> Index:
    """``count`` JPEGs of different sizes."""
    rng = np.random.default_rng(7)
    sizes = rng.integers(40, 120, (count, 2))
    return index_of(folder, [encoded(picture(int(w), int(h), seed)) for seed, (w, h) in enumerate(sizes)])
