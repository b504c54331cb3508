"""Common files are sound, and a header that any reader could stumble over is not."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpctrain.data.decode import fault_of
from hpctrain.data.index import RECORD
from hpctrain.data.soundness import is_sound
from tests.unit.pictures import encoded, picture

PHOTO = picture(64, 48)
#: EXIF tags with text and with a fraction, both stored behind the directory.
MAKER, X_RESOLUTION, ORIENTATION = 0x010F, 0x011A, 0x0112


def record_of(width: int = 64, height: int = 48, orientation: int = 1) -> np.void:
    record: np.void = np.zeros(1, RECORD)[0]
    record["width"], record["height"], record["orientation"] = width, height, orientation
    return record


def saved(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def with_exif(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[MAKER], exif[ORIENTATION], exif[X_RESOLUTION] = "a maker of cameras", orientation, 72.0
    return saved(PHOTO, exif=exif)


def segment(marker: int, contents: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(contents) + 2) + contents


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def cut(data: bytes, start: int, length: int) -> bytes:
    return data[:start] + data[start + length :]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_sound_as_its_index_has_it(image_format: str, orientation: int) -> None:
    data = encoded(PHOTO, orientation, image_format)
    size = (64, 48) if orientation < 5 else (48, 64)
    assert is_sound(data, record_of(*size, orientation))
    assert not is_sound(data, record_of(*size[::-1], orientation))
    assert not is_sound(data, record_of(*size, orientation % 8 + 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"subsampling": 0},
        {"optimize": True},
        {"comment": b"x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_common_make_are_sound(mode: str, options: dict[str, Any]) -> None:
    assert is_sound(saved(PHOTO.convert(mode), **options), record_of())


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "I;16"])
def test_pngs_of_common_make_are_sound(mode: str) -> None:
    grey = np.asarray(PHOTO.convert("L")).astype(np.uint16) << 8
    image = Image.fromarray(grey) if mode == "I;16" else PHOTO.convert(mode)
    assert is_sound(saved(image, "PNG"), record_of())


def broken_jpegs() -> dict[str, bytes]:
    good = saved(PHOTO)
    frame, tables, scan = (good.index(marker) for marker in (b"\xff\xc0", b"\xff\xc4", b"\xff\xda"))
    return {
        "empty": b"",
        "text": b"this is no picture" * 20,
        "zero bytes": bytes(len(good)),
        "markers alone": b"\xff\xd8\xff\xd9",
        "cut off": good[: len(good) // 2],
        "bytes behind the end": good + b"\n",
        "headers, then nothing": good[:scan] + b"\xff\xd9",
        "zeroed tables": replaced(good, tables + 4, bytes(scan - tables - 4)),
        "a length of one": replaced(good, tables + 2, b"\x00\x01"),
        "a length beyond the end": replaced(good, tables + 2, b"\xff\xff"),
        "an odd marker": replaced(good, tables, b"\xff\x01"),
        "fill bytes": good[:tables] + b"\xff\xff" + good[tables:],
        "no frame": cut(good, frame, 19),
        "two frames": good[:frame] + good[frame : frame + 19] + good[frame:],
        "an arithmetic frame": replaced(good, frame, b"\xff\xc9"),
        "a lossless frame": replaced(good, frame, b"\xff\xc3"),
        "17 bits": replaced(good, frame + 4, b"\x11"),
        "another height": replaced(good, frame + 5, b"\x00\x31"),
        "no height": replaced(good, frame + 5, b"\x00\x00"),
        "two components": replaced(good, frame + 9, b"\x02"),
        "no sampling": replaced(good, frame + 11, b"\x00"),
        "a table that there cannot be": replaced(good, frame + 12, b"\x04"),
        "five components in a scan": replaced(good, scan + 4, b"\x05"),
        "EXIF twice": with_exif()[:2] + segment(0xE1, b"Exif\0\0MM\0*" + bytes(8)) + with_exif()[2:],
        "an APP1 too short for its name": good[:2] + segment(0xE1, b"Exif") + b"\0\0" + good[2:],
    }


@pytest.mark.parametrize("case", broken_jpegs())
def test_jpegs_in_doubt(case: str) -> None:
    data = broken_jpegs()[case]
    assert not is_sound(data, record_of())
    assert not is_sound(data, record_of(48, 64, 6))


def broken_pngs() -> dict[str, bytes]:
    good = saved(PHOTO, "PNG")
    pixels = good.index(b"IDAT") - 4
    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0")
    return {
        "signature alone": good[:8] + good[-12:],
        "cut off": good[:-12],
        "cut off, and an end": good[:-40] + good[-12:],
        "bytes behind the end": good + b"\n",
        "not the header first": good[:8] + exif + good[8:],
        "3 bits": replaced(good, 24, b"\x03"),
        "4 bits in colour": replaced(good, 24, b"\x04"),
        "a colour type that there is not": replaced(good, 25, b"\x05"),
        "another compression": replaced(good, 26, b"\x01"),
        "another filter": replaced(good, 27, b"\x01"),
        "another interlace": replaced(good, 28, b"\x02"),
        "another width": replaced(good, 16, b"\0\0\0\x41"),
        "a chunk beyond the end": replaced(good, pixels, b"\xff\xff\xff\xff"),
        "a chunk that ends elsewhere": replaced(good, pixels + 3, bytes([good[pixels + 3] ^ 1])),
        "EXIF twice": good[:pixels] + exif + exif + good[pixels:],
    }


@pytest.mark.parametrize("case", broken_pngs())
def test_pngs_in_doubt(case: str) -> None:
    assert not is_sound(broken_pngs()[case], record_of())


@pytest.mark.parametrize("tag", [MAKER, X_RESOLUTION])
def test_exif_data_that_readers_may_give_up_are_in_doubt(tag: int) -> None:
    data = with_exif()
    assert is_sound(data, record_of(48, 64, 6))
    block = data.index(b"Exif\0\0") + 6
    order = "<" if data[block : block + 1] == b"I" else ">"
    entry = data.index(struct.pack(order + "H", tag), block)
    beyond = replaced(data, entry + 8, struct.pack(order + "I", 10_000))
    assert not is_sound(beyond, record_of(48, 64, 6))
    assert not is_sound(beyond, record_of())
    upright = with_exif(1)
    beyond = replaced(upright, entry + 8, struct.pack(order + "I", 10_000))
    assert is_sound(beyond, record_of()), "upright for those who give up, too"


@pytest.mark.parametrize(("second", "sound"), [(6, True), (1, False), (8, False)])
def test_an_orientation_stated_twice(second: int, sound: bool) -> None:
    entries = [struct.pack(">HHIHH", ORIENTATION, 3, 1, value, 0) for value in (6, second)]
    block = b"MM\0*" + struct.pack(">IH", 8, 2) + b"".join(entries) + bytes(4)
    assert is_sound(saved(PHOTO, exif=b"Exif\0\0" + block), record_of(48, 64, 6)) is sound


def test_exif_of_no_known_order_or_with_entries_cut_off_is_in_doubt() -> None:
    data = with_exif(1)
    assert is_sound(data, record_of())
    block = data.index(b"Exif\0\0") + 6
    assert not is_sound(replaced(data, block, b"XX"), record_of())
    entries = data.index(struct.pack(">H" if data[block] == ord("M") else "<H", 3), block + 8)
    assert not is_sound(replaced(data, entries, b"\x7f\x7f"), record_of())


FILES = [
    saved(PHOTO),
    saved(PHOTO, progressive=True),
    with_exif(),
    saved(PHOTO.convert("CMYK")),
    saved(PHOTO, "PNG"),
    encoded(PHOTO, 6, "PNG"),
]


@settings(deadline=None, max_examples=300)
@given(
    data=st.sampled_from(FILES),
    changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_whatever_is_sound_has_the_size_that_its_index_states(data: bytes, changes: list[tuple[int, int]]) -> None:
    broken = bytearray(data)
    for place, value in changes:
        broken[place % len(broken)] = value
    for record in (record_of(), record_of(48, 64, 6)):
        if is_sound(bytes(broken), record):
            assert "pixels" not in str(fault_of(bytes(broken), record))
