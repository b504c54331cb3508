"""Whether a file's headers are beyond doubt, told from its bytes alone in a few microseconds.

A decoder that meets a broken header in the middle of a large batch may take the process down with it (DALI does, see
``hpctrain.data.dali``), so doubtful files are looked at by themselves first. Doubt is no verdict: what counts as
corrupt is for ``hpctrain.data.decode`` to say. Compressed data are not looked into.
"""

from __future__ import annotations

import struct

import numpy as np

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

#: Markers with contents of a stated length (ITU-T T.81, table B.1): all from here on but restarts, start, end and fill.
_FIRST_SEGMENT, _NO_SEGMENT = 0xC0, frozenset((*range(0xD0, 0xDA), 0xFF))
_START_OF_SCAN, _APP1 = 0xDA, 0xE1

#: Baseline, extended and progressive JPEG, Huffman coded, and the other kinds of frame, which are rare.
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}

#: Bits a channel for each of PNG's colour types (PNG specification, table 11.1).
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}

_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
#: EXIF tags with text, and those with so many fractions of 8 bytes: readers that follow where these point give a whole
#: block up, its orientation included, when one points out of it.
_TEXTS = frozenset((0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298))
_FRACTIONS = {0x011A: 1, 0x011B: 1, 0x013E: 2, 0x013F: 6, 0x0211: 3, 0x0214: 6}


def is_sound(data: bytes, record: np.void) -> bool:
    """Whether ``data`` is a JPEG or PNG of common make, from start to end marker, and as ``record`` (RECORD) says.

    That is: every header is complete and plausible, and size and orientation are those of the index, in the eyes of
    any reader. A good file may fail: of a rare make, with bytes behind its end, or with EXIF data that readers
    may differ about.
    """
    size = int(record["width"]), int(record["height"])
    orientation = int(record["orientation"])
    stored = size if orientation < 5 else size[::-1]
    try:
        if data.startswith(_JPEG_START) and data.endswith(_JPEG_END):
            return _jpeg_shows(data) == (stored, orientation)
        if data.startswith(_PNG_START) and data.endswith(_PNG_END):
            return _png_shows(data) == (stored, orientation)
    except (_Doubt, IndexError, struct.error):
        pass
    return False


class _Doubt(Exception):
    """Something is not as common files have it."""


def _demand(condition: bool) -> None:
    if not condition:
        raise _Doubt


def _jpeg_shows(data: bytes) -> tuple[tuple[int, int], int]:
    """Size as stored and orientation of a JPEG: its segments up to the first scan (ITU-T T.81, annex B.2)."""
    size: tuple[int, int] | None = None
    orientation: int | None = None
    position = 2
    while True:
        _demand(data[position] == 0xFF)
        marker = data[position + 1]
        _demand(marker >= _FIRST_SEGMENT and marker not in _NO_SEGMENT and marker not in _OTHER_FRAMES)
        start = position + 4
        position += 2 + (data[position + 2] << 8 | data[position + 3])
        _demand(start <= position <= len(data) - 2)
        if marker in _FRAMES:
            _demand(size is None)
            size = _frame_size(data[start:position])
        elif marker == _APP1 and data.startswith(_EXIF, start):
            _demand(orientation is None)
            orientation = _exif_orientation(data[start + len(_EXIF) : position])
        elif marker == _START_OF_SCAN:
            components = data[start]
            if size is None or not 1 <= components <= 4 or position - start != 4 + 2 * components:
                raise _Doubt
            return size, orientation or 1


def _frame_size(frame: bytes) -> tuple[int, int]:
    """The size in a frame header of 8-bit samples (annex B.2.2)."""
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    _demand(precision == 8 and components in (1, 3, 4) and len(frame) == 6 + 3 * components)
    for sampling, table in zip(frame[7::3], frame[8::3], strict=True):
        _demand(1 <= sampling >> 4 <= 4 and 1 <= sampling & 15 <= 4 and table <= 3)
    return width, height


def _png_shows(data: bytes) -> tuple[tuple[int, int], int]:
    """Size as stored and orientation of a PNG: all its chunks, whose checksums are left to the decoder."""
    length, kind, width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(
        ">I4sIIBBBBB", data, 8
    )
    _demand(length == 13 and kind == b"IHDR" and depth in _PNG_DEPTHS.get(colour, ()))
    _demand(compression == filtering == 0 and interlace <= 1)
    orientation: int | None = None
    position = 33
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"eXIf":
            _demand(orientation is None)
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        position += 12 + length
    _demand(position == len(data))
    return (width, height), orientation or 1


def _exif_orientation(block: bytes) -> int:
    """The orientation in the first directory of a TIFF structure (EXIF 2.3, 4.6.2), 1 when there is none."""
    _demand(block.startswith((b"II*\0", b"MM\0*")))
    order = "<" if block.startswith(b"I") else ">"
    (directory,) = struct.unpack_from(order + "I", block, 4)
    (entries,) = struct.unpack_from(order + "H", block, directory)
    start = directory + 2
    _demand(start + 12 * entries <= len(block))
    orientation: int | None = None
    followed = True
    for tag, _, count, value in struct.iter_unpack(order + "HHII", block[start : start + 12 * entries]):
        if tag in _TEXTS:
            followed &= count <= 4 or value + count <= len(block)
        elif tag in _FRACTIONS:
            followed &= value + 8 * _FRACTIONS[tag] <= len(block)
        elif tag == _ORIENTATION:
            # Two bytes of the four, whatever type is stated.
            stated = value & 0xFFFF if order == "<" else value >> 16
            _demand(orientation in (None, stated))
            orientation = stated
    shown = orientation if orientation is not None and 1 <= orientation <= 8 else 1
    _demand(followed or shown == 1)  # who gives up takes the picture as upright
    return shown
