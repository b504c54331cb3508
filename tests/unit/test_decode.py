"""Pillow's reference picture: windows of upright pictures, and the verdict on broken files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from hpctrain.data.decode import decode, fault_of
from tests.unit.pictures import encoded, index_of, picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_a_window_of_a_turned_picture(tmp_path: Path, orientation: int, flip: bool) -> None:
    data = encoded(picture(90, 70), orientation)
    (record,) = index_of(tmp_path, [data]).samples
    window = np.array([11, 7, 40, 40])
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = np.asarray(upright.crop((11, 7, 51, 47)))
    shown = decode(data, record, window, flip, 40, 3)
    assert np.array_equal(shown[:, ::-1] if flip else shown, expected)


def test_a_window_is_resized_as_a_picture_of_its_own_would_be(tmp_path: Path) -> None:
    image = picture(300, 200)
    data = encoded(image, image_format="PNG")
    (record,) = index_of(tmp_path, [data]).samples
    shown = decode(data, record, np.array([50, 20, 120, 90]), False, 64, 3)
    expected = image.crop((50, 20, 170, 110)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(shown.astype(int) - np.asarray(expected)).mean() < 0.5


def test_a_small_window_is_not_blurred_with_what_lies_beyond_it(tmp_path: Path) -> None:
    image = picture(60, 40)
    data = encoded(image, image_format="PNG")
    (record,) = index_of(tmp_path, [data]).samples
    shown = decode(data, record, np.array([20, 10, 7, 9]), False, 64, 3)
    expected = image.crop((20, 10, 27, 19)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(shown, np.asarray(expected))


def test_a_large_jpeg_is_decoded_at_a_fraction_without_moving_the_window(tmp_path: Path) -> None:
    image = picture(1600, 1200)
    data = encoded(image)
    (record,) = index_of(tmp_path, [data]).samples
    shown = decode(data, record, np.array([200, 100, 1280, 1024]), False, 64, 3)
    expected = image.crop((200, 100, 1480, 1124)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(shown.astype(int) - np.asarray(expected)).mean() < 1.0


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    (record,) = index_of(tmp_path, [buffer.getvalue()]).samples
    shown = decode(buffer.getvalue(), record, np.array([0, 0, 64, 64]), False, 64, 1)
    assert np.array_equal(shown[..., 0], (values >> 8).astype(np.uint8))


def test_faults_are_told_in_words(tmp_path: Path) -> None:
    whole = encoded(picture(60, 40))
    (record,) = index_of(tmp_path, [whole]).samples
    assert fault_of(whole, record) is None
    assert fault_of(whole + b"more", record) is None
    turned = encoded(picture(60, 40), 6)
    (upright,) = index_of(tmp_path, [turned]).samples
    assert (upright["width"], upright["height"]) == (40, 60)
    assert fault_of(turned, upright) is None
    assert "truncated" in str(fault_of(whole[: len(whole) // 2], record))
    assert fault_of(b"hello", record) == "cannot identify image file"
    assert fault_of(encoded(picture(40, 60)), record) == "it is 40 x 60 pixels, its index says otherwise"
    png = bytearray(encoded(picture(60, 40), image_format="PNG"))
    png[60:64] = b"\xff\xff\xff\xff"
    assert fault_of(bytes(png), record)


def test_a_picture_of_absurd_size_is_a_fault_and_not_an_allocation(tmp_path: Path) -> None:
    png = bytearray(encoded(picture(60, 40), image_format="PNG"))
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (record,) = index_of(tmp_path, [encoded(picture(60, 40))]).samples
    assert "decompression bomb" in str(fault_of(bytes(png), record))
