"""Sizes as Slurm writes them."""

from __future__ import annotations

import pytest

from hpctrain.launch.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("1234K", 1234 * 1024), ("1.50G", 3 * 2**29), ("0", 0), ("512", 512), ("2T", 2**41), ("1P", 2**50)),
        *(("", None), ("-", None), ("1.5.2K", None), ("12Q", None), ("G", None), ("480g", None)),
    ],
)
def test_sizes_as_slurm_writes_them(text: str, size: int | None) -> None:
    assert parse_size(text, 1024) == size


def test_letters_stand_for_powers_of_the_base() -> None:
    assert parse_size("2M", 1000) == 2_000_000
