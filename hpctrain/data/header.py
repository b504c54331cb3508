"""What a picture says about itself: format, colour mode, upright size; and whether it decodes to its end.

Pillow reads the headers (its open is lazy: no pixel is decoded). Decoding for training belongs to the loaders.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

#: File names that are taken for pictures, by their ending, whatever its case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

#: Read first from a file to find its size; most headers end in the first kilobyte, some carry a colour profile.
HEADER_BYTES = 32 * 1024

#: Widths and heights are kept in 16 bits; JPEG itself ends there.
MAX_SIDE = 65_535

_ORIENTATION_TAG = 0x0112

Fault = Literal["zero-byte", "not-an-image", "truncated", "corrupt"]


class BadPicture(Exception):
    """A picture that cannot be used: ``fault`` is its kind, the message says what is wrong with it."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault


@dataclass(frozen=True, slots=True)
class Header:
    """``width`` and ``height`` in pixels once the EXIF ``orientation`` (1 … 8) is applied; Pillow's mode."""

    width: int
    height: int
    orientation: int
    format: Literal["jpeg", "png"]
    mode: str


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture; hidden files never are."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_header(data: bytes) -> Header:
    """The header of a JPEG or PNG from its first bytes; raises BadPicture."""
    if not data:
        raise BadPicture("zero-byte", "is empty")
    with _open(data) as image:
        orientation = _orientation(image)
        width, height = image.size
        if max(width, height) > MAX_SIDE:
            raise BadPicture("corrupt", f"is {width} x {height} pixels, more than {MAX_SIDE} on a side")
        if orientation >= 5:
            width, height = height, width
        # Pillow calls a JPEG that carries further pictures (of many phones) MPO.
        return Header(width, height, orientation, "png" if image.format == "PNG" else "jpeg", image.mode)


def read_file_header(path: str | Path) -> tuple[Header, int]:
    """The header of a file and its size in bytes; reads no more of it than needed.

    Raises BadPicture for its contents, OSError when it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(HEADER_BYTES)
        size = file.seek(0, io.SEEK_END)
        try:
            return read_header(start), size
        except BadPicture:
            if size <= len(start):
                raise
            file.seek(0)
            return read_header(file.read()), size


def check_end(data: bytes, header: Header) -> None:
    """Raise BadPicture when a picture is cut short.

    A picture that ends with its end marker is taken as whole, so this costs nothing for most; the others are
    decoded, because many have something after it. Errors within the data are not searched for.
    """
    marker = b"\xff\xd9" if header.format == "jpeg" else b"IEND"
    if marker not in data[-64:]:
        decode(data)


def decode(data: bytes) -> None:
    """Decode every pixel; raises BadPicture when that fails."""
    with _open(data) as image:
        try:
            image.load()
        except Image.DecompressionBombError as error:
            raise BadPicture("corrupt", str(error)) from error
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            raise BadPicture(_fault(error), f"does not decode: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except UnidentifiedImageError:
        raise BadPicture("not-an-image", "is neither a JPEG nor a PNG") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise BadPicture(_fault(error), f"has a broken header: {error}") from error


def _fault(error: Exception) -> Fault:
    return "truncated" if "truncated" in str(error).lower() else "corrupt"


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # broken EXIF is common and harmless: decoders take such a picture as upright
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
