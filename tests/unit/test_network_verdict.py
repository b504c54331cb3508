"""An exchange is judged by the ring's bound over each engine, in its fastest reduction."""

from __future__ import annotations

from typing import Any

from benchmarks.network import verdict


def row(competitor: str, over_bound: float, compression: str = "fp16") -> dict[str, Any]:
    return {"competitor": competitor, "over_bound": over_bound, "compression": compression}


def test_each_engine_of_ours_has_to_keep_to_the_bar() -> None:
    rows = [row("hpctrain_torch", 1.02), row("ddp", 1.3), row("hpctrain_mpi", 1.09), row("hpctrain_torch", 1.4)]
    assert verdict(rows) == {
        "sentence": "an exchange in fp16 takes 1.020 (hpctrain_torch), 1.090 (hpctrain_mpi) times what a ring must "
        "take",
        "passed": True,
        "bar": 1.1,
    }
    assert verdict([*rows, row("hpctrain_horovod", 1.11)])["passed"] is False


def test_without_ours_in_fp16_nothing_is_judged() -> None:
    assert verdict([row("ddp", 1.0), row("hpctrain_torch", 1.01, "none")]) == {
        "sentence": "nothing of ours was measured in fp16"
    }
