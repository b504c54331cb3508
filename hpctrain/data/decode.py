"""Pictures by Pillow: the reference every loader agrees with, and the judge of files that cannot be decoded.

Pillow decodes a whole file before it cuts a window out; a loader that only decodes the window sees less of the
file. What counts as corrupt is therefore decided here, for all loaders. Reading and batching are theirs.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

#: For each EXIF orientation: whether x and y run backwards, and how the stored picture is turned upright.
#: From 5 on, the axes are exchanged too.
_ORIENTATIONS: dict[int, tuple[bool, bool, Image.Transpose | None]] = {
    1: (False, False, None),
    2: (True, False, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (True, True, Image.Transpose.ROTATE_180),
    4: (False, True, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (False, False, Image.Transpose.TRANSPOSE),
    6: (True, False, Image.Transpose.ROTATE_270),
    7: (True, True, Image.Transpose.TRANSVERSE),
    8: (False, True, Image.Transpose.ROTATE_90),
}


#: Resolution left to the last, exact resize, as a multiple of the output's. On real photographs 2 differs from
#: no shortcut by at most half a grey level on average over a picture, 1 by up to four.
REDUCING_GAP = 2


def fault_of(data: bytes, record: np.void) -> str | None:
    """Why a file cannot be used as its index ``record`` (RECORD) says, or None; decodes all of it."""
    size = int(record["width"]), int(record["height"])
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (size[::-1] if record["orientation"] >= 5 else size):
                return f"it is {image.size[0]} x {image.size[1]} pixels, its index says otherwise"
            image.load()
    except Exception as error:  # whatever a decoder meets in a broken file, it is an answer about the file
        return str(error).split(" <_io.BytesIO")[0] or type(error).__name__
    return None


def stored_window(window: np.ndarray, record: np.void) -> tuple[int, int, int, int]:
    """The window (x, y, w, h) of the upright picture in coordinates of the picture as it is stored."""
    x, y, w, h = (int(value) for value in window)
    backwards_x, backwards_y, _ = _ORIENTATIONS[int(record["orientation"])]
    if backwards_x:
        x = int(record["width"]) - x - w
    if backwards_y:
        y = int(record["height"]) - y - h
    return (y, x, h, w) if record["orientation"] >= 5 else (x, y, w, h)


def decode(data: bytes, record: np.void, window: np.ndarray, flip: bool, size: int, channels: int) -> np.ndarray:
    """The window (x, y, w, h) of one upright picture, resized to ``size`` and mirrored: uint8 [size, size, channels].

    A JPEG is decoded at a fraction of its size, and a picture shrunk by whole factors, as long as that leaves at
    least twice the resolution asked for. Raises what Pillow raises when the file is broken.
    """
    x, y, w, h = stored_window(window, record)
    image: Image.Image = Image.open(io.BytesIO(data))
    mode, full_size = ("RGB" if channels == 3 else "L"), image.size
    image.draft(mode, (REDUCING_GAP * full_size[0] * size // w, REDUCING_GAP * full_size[1] * size // h))
    image = _in_mode(image, mode)
    scale_x, scale_y = image.size[0] / full_size[0], image.size[1] / full_size[1]
    box = (x * scale_x, y * scale_y, (x + w) * scale_x, (y + h) * scale_y)
    if w < size or h < size:
        # Given a box, Pillow looks half a pixel beyond it. Where pixels are spread over many, that shows.
        image, box = image.crop((x, y, x + w, y + h)), (0, 0, w, h)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=REDUCING_GAP)
    turn = _ORIENTATIONS[int(record["orientation"])][2]
    if turn is not None:
        image = image.transpose(turn)
    pixels = np.asarray(image).reshape(size, size, channels)
    return pixels[:, ::-1] if flip else pixels


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion cuts values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)
