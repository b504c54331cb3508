"""Formats are compared by the spread of seeds."""

from __future__ import annotations

from typing import Any

from benchmarks.seeds import judge


def rows(**found: list[float]) -> list[dict[str, Any]]:
    return [{"compression": name, "top1": value} for name, values in found.items() for value in values]


def test_a_mean_within_the_spread_of_seeds_passes() -> None:
    verdict = judge(rows(none=[0.50, 0.54, 0.52], fp16=[0.50, 0.50, 0.50]), ["none", "fp16"])
    assert verdict["passed"]
    assert round(verdict["spread"], 6) == 0.04
    assert round(verdict["apart"]["fp16"], 6) == -0.02
    assert verdict["sentence"] == "top-1: none 0.5200 (0.5000 to 0.5400); fp16 0.5000 (0.5000 to 0.5000)"


def test_a_mean_beyond_it_does_not() -> None:
    assert not judge(rows(none=[0.50, 0.54, 0.52], fp16=[0.45, 0.46, 0.47]), ["none", "fp16"])["passed"]
