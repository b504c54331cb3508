from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.data import header
from hpctrain.data.header import BadPicture, check_end, decode, is_image_name, read_file_header, read_header
from tests.unit.image_folders import encoded


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_size_and_format(form: str) -> None:
    found = read_header(encoded(1, 31, 17, form=form))
    assert (found.width, found.height, found.orientation, found.format) == (31, 17, 1, form.lower())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_picture(orientation: int) -> None:
    found = read_header(encoded(1, 31, 17, orientation=orientation))
    assert found.orientation == orientation
    assert (found.width, found.height) == ((31, 17) if orientation < 5 else (17, 31))


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_orientation_outside_the_standard_counts_as_upright(orientation: int) -> None:
    assert read_header(encoded(1, 31, 17, orientation=orientation)).orientation == 1


def test_broken_exif_counts_as_upright() -> None:
    data = encoded(1, 31, 17, orientation=6)
    found = read_header(data.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX"))
    assert (found.width, found.height, found.orientation) == (31, 17, 1)


def test_a_long_header_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "HEADER_BYTES", 64)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(1, 31, 17))
    found, size = read_file_header(path)
    assert (found.width, found.height, size) == (31, 17, path.stat().st_size)


@pytest.mark.parametrize(
    ("data", "fault", "message"),
    [
        (b"", "zero-byte", "is empty"),
        (b"hello, world", "not-an-image", "is neither a JPEG nor a PNG"),
        (encoded(1)[:300], "truncated", "has a broken header: Truncated File Read"),
    ],
)
def test_faults_of_headers(data: bytes, fault: str, message: str) -> None:
    with pytest.raises(BadPicture, match=message) as caught:
        read_header(data)
    assert caught.value.fault == fault


def test_too_large_for_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_SIDE", 30)
    with pytest.raises(BadPicture, match="is 31 x 17 pixels, more than 30 on a side"):
        read_header(encoded(1, 31, 17))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_cut_short_is_told_from_one_with_something_after_it(form: str) -> None:
    data = encoded(1, 200, 200, form=form)
    check_end(data, read_header(data))
    check_end(data + bytes(1000), read_header(data))
    cut = data[: len(data) * 2 // 3]
    with pytest.raises(BadPicture, match="does not decode") as caught:
        check_end(cut, read_header(cut))
    assert caught.value.fault == "truncated"


def test_damage_within_a_picture_is_found_by_decoding() -> None:
    data = bytearray(encoded(1, 64, 64, form="PNG"))
    middle = data.index(b"IDAT") + 10
    data[middle : middle + 20] = bytes(20)
    check_end(bytes(data), read_header(bytes(data)))
    with pytest.raises(BadPicture, match="does not decode"):
        decode(bytes(data))


def test_names_of_pictures() -> None:
    assert [name for name in ("a.jpg", "b.JPEG", "c.png", ".d.jpg", "e.txt", "jpg") if is_image_name(name)] == [
        "a.jpg",
        "b.JPEG",
        "c.png",
    ]
