"""Small pictures and image folders for tests of the data store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    """A picture of random colours, the same for the same seed."""
    depth = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, depth), dtype=np.uint8)
    return Image.fromarray(coarse.squeeze(), mode).resize((width, height), Image.Resampling.BILINEAR)


def encoded(
    seed: int, width: int = 24, height: int = 16, mode: str = "RGB", form: str = "JPEG", orientation: int | None = None
) -> bytes:
    """The same as a file's bytes, with an EXIF orientation where one is given."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture(seed, width, height, mode).save(buffer, form, exif=exif)
    return buffer.getvalue()


def image_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """An image folder: ``parts`` gives the pictures a class of each part, "" meaning no split."""
    seed = 0
    for part, per_class in parts.items():
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                (folder / f"{name}{number}.jpg").write_bytes(encoded(seed, 16 + seed % 5, 12 + seed % 3))
                seed += 1
    return root


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
