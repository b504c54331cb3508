"""The phase clock on a GPU: it measures the stream, and does not hold the host up."""

from __future__ import annotations

import time

import pytest
import torch

from hpctrain.metrics.clock import PhaseClock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SPIN_CYCLES = 20_000_000


def spin_s(device: torch.device) -> float:
    """Seconds that ``SPIN_CYCLES`` keep the stream busy."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    torch.cuda._sleep(SPIN_CYCLES)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e-3


def test_phases_are_stream_time_and_the_host_runs_ahead() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    expected_s = spin_s(device)
    clock = PhaseClock(device)
    started = time.perf_counter()
    for step in range(20):
        clock.step(step)
        clock.enter("data")
        clock.enter("forward")
        torch.cuda._sleep(SPIN_CYCLES)
        clock.enter("backward")
        torch.cuda._sleep(2 * SPIN_CYCLES)
        clock.end_step()
    enqueued_s = time.perf_counter() - started
    interval = clock.interval()
    assert enqueued_s < 0.5 * interval.seconds, "a boundary waited for the device"
    assert interval.phases_s["forward"] == pytest.approx(expected_s, rel=0.1)
    assert interval.phases_s["backward"] == pytest.approx(2 * expected_s, rel=0.1)
    assert interval.phases_s["data"] < 0.1 * expected_s


def test_waiting_for_data_shows_as_idle_stream() -> None:
    clock = PhaseClock(torch.device("cuda", torch.cuda.current_device()))
    for step in range(3):
        clock.step(step)
        clock.enter("data")
        time.sleep(0.05)
        clock.enter("forward")
        clock.end_step()
    assert clock.interval().phases_s["data"] == pytest.approx(0.05, rel=0.2)
