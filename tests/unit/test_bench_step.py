"""The step benchmark: the loops compute the same, a loop that does not is caught, ratios are taken by rounds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from hpctrain.bench import command, step, variants
from hpctrain.bench.blocks import WARMUP_STEPS, Sample, run_block, run_rounds
from hpctrain.bench.report import compare, sentence
from hpctrain.bench.variants import Variant
from hpctrain.bench.verify import VERIFIED_STEPS, difference, snapshot, verify
from hpctrain.comm.base import Communicator
from hpctrain.comm.horovod_engine import HorovodCommunicator, ReleasedHorovod
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.config.load import load_config
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import Topology
from hpctrain.train.session import open_session
from tests.unit.fake_group import run_group

CONFIG = """
model: {name: dense, neurons: 8, dropout: 0.5, batch_norm: true}
data: {image_size: 4, num_classes: 3, synthetic_samples: 40}
train: {batch_per_worker: 8, label_smoothing: 0.1}
log: {every_steps: 2, tensorboard: false}
comm: {engine: serial}
"""
ALONE = SerialCommunicator(Topology(), torch.device("cpu"))


def measure(folder: Path, *overrides: str, rounds: int = 2) -> dict[str, Any]:
    (folder / "config.yaml").write_text(CONFIG)
    config = load_config(folder / "config.yaml", [*overrides, *step.FIXED])
    with open_session(config.comm, config.train.device) as session:
        return step.measure(config, session, folder, rounds, lambda done: None, mpi_is_held=False)


def test_the_record_has_every_sample_and_the_loops_agree(tmp_path: Path) -> None:
    record = measure(tmp_path, rounds=3)
    assert list(record["variants"]) == ["hpctrain", "bare"]
    for figures in record["variants"].values():
        assert len(figures["samples"]["step_s"]) == 3
        assert min(figures["samples"]["step_s"]) > 0
        assert figures["images_per_s"] == 8 / figures["step_s"]["median"]
    assert record["verified"]["apart"]["bare"] < 1e-5
    assert record["unavailable"] == {"horovod": "the engine of this job is serial"}
    assert len(record["ratios"]["overhead"]["rounds"]) == 3
    assert len(record["memory"]["ranks"]) == 1
    # Our loop logs as it does in a run: verified and timed steps, one line every second.
    steps = VERIFIED_STEPS + 3 * (WARMUP_STEPS + 2)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == steps // 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loops_agree_in_narrow_formats(tmp_path: Path, precision: str) -> None:
    apart = measure(tmp_path, f"train.precision={precision}", rounds=1)["verified"]["apart"]["bare"]
    assert 0 <= apart < 0.1


def test_a_loop_that_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Smoothed(variants.ByHand):
        def step(self, update: Any) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] *= 1.01
            super().step(update)

    monkeypatch.setattr(variants, "ByHand", Smoothed)
    with pytest.raises(MachineError, match=r"after 3 steps bare is 0\.0\d+ of the way away from hpctrain"):
        measure(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.accumulation=2", r"steps of one micro-batch: set train\.accumulation=1"),
        ("train.ema_decay=0.9", r"no moving average: set train\.ema_decay=none"),
    ],
)
def test_what_the_loops_by_hand_do_not_do_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(tmp_path, override)


def test_a_result_that_cannot_be_kept_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    missing = tmp_path / "absent" / "x.json"
    for run in (command.bench_step_command, command.bench_data_command):
        with pytest.raises(UserError, match=r"the folder of .*absent/x\.json does not exist: make it"):
            run(tmp_path / "config.yaml", [], 1, missing)


def test_the_data_bench_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="measures one process, but mpirun started more: leave it out"):
        command.bench_data_command(tmp_path / "config.yaml", [], 1, None)


def test_horovod_with_a_cycle_time_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
    with pytest.raises(UserError, match="HOROVOD_CYCLE_TIME is set, but Horovod is to run as released: unset it"):
        ReleasedHorovod(cast(Any, ALONE))


def test_horovod_over_mpi_is_left_out_where_it_cannot_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    class OverMpi(HorovodCommunicator):
        def __init__(self) -> None:
            Communicator.__init__(self, Topology(world_size=2), torch.device("cpu"))

        def versions(self) -> dict[str, str]:
            return {"horovod_controller": "mpi"}

    for name in ("ours", "bare", "bare_local"):
        monkeypatch.setattr(variants, name, lambda *_, name=name: name)
    loop = cast(Any, SimpleNamespace(parts=SimpleNamespace(comm=OverMpi())))
    found, unavailable = step._variants(loop, [], mpi_is_held=False)
    assert found == ["ours", "bare", "bare_local"]
    assert unavailable == {"horovod": "over MPI it restarts only where mpi4py is installed"}


def counting(name: str, calls: list[str]) -> Variant:
    @contextmanager
    def turn() -> Iterator[None]:
        calls.append(f"{name} in")
        yield
        calls.append(f"{name} out")

    return Variant(name, "", nn.Linear(1, 1), lambda: calls.append(name), turn)


def test_a_block_runs_within_the_turn_and_warms_up() -> None:
    calls: list[str] = []
    ticks = itertools.count()
    sample = run_block(counting("a", calls), ALONE, 4, lambda: next(ticks))
    assert calls == ["a in", *["a"] * (WARMUP_STEPS + 4), "a out"]
    assert next(ticks) == WARMUP_STEPS + 4
    assert sample.step_s > 0


def test_rounds_run_every_variant_once_in_changing_order() -> None:
    calls: list[str] = []
    told: list[int] = []
    competitors = [counting(name, calls) for name in "abc"]
    samples = run_rounds(competitors, ALONE, rounds=8, steps=1, seed=1, tick=lambda: None, on_round=told.append)
    entries = [call[0] for call in calls if call.endswith("in")]
    rounds = ["".join(entries[start : start + 3]) for start in range(0, 24, 3)]
    assert all(Counter(order) == Counter("abc") for order in rounds)
    assert len(set(rounds)) > 2
    assert told == list(range(1, 9))
    assert {name: len(found) for name, found in samples.items()} == {"a": 8, "b": 8, "c": 8}


def of(*step_s: float) -> list[Sample]:
    return [Sample(seconds, seconds) for seconds in step_s]


def test_ratios_are_taken_within_rounds() -> None:
    # The machine became twice as slow after the first round: ratios do not see that.
    samples = {"hpctrain": of(1.0, 2.2, 2.0), "bare": of(1.0, 2.0, 2.0), "horovod": of(1.5, 3.3, 3.0)}
    compared = compare(samples)
    assert compared["overhead"]["rounds"] == pytest.approx([0.0, 0.1, 0.0])
    assert compared["overhead"]["median"] == pytest.approx(0.0)
    assert compared["speedup_over_horovod"]["median"] == pytest.approx(1.5)
    assert "overhead_and_exchange" not in compared
    assert compare({**samples, "bare_local": of(0.5, 1.1, 1.0)})["overhead_and_exchange"]["median"] == pytest.approx(
        1.0
    )


def test_the_sentence_tells_figures_and_what_is_missing() -> None:
    compared = compare({"hpctrain": of(1.02, 1.02), "bare": of(1.0, 1.0), "horovod": of(1.53, 1.53)})
    told = sentence(compared, {})
    assert "takes 2.0% more time than the bare loop's (rounds: +2.0% to +2.0%)" in told
    assert "1.500 times the images/s of Horovod's" in told
    told = sentence(compare({"hpctrain": of(0.9), "bare": of(1.0)}), {"horovod": "no reason"})
    assert "takes 10.0% less time" in told
    assert told.endswith("; horovod was not measured: no reason.")


def test_difference_is_a_share_of_the_way() -> None:
    start, reference = torch.zeros(2), torch.tensor([3.0, 4.0])
    assert difference(reference, reference, start) == 0.0
    assert difference(reference, torch.tensor([3.0, 4.5]), start) == pytest.approx(0.1)


def test_verify_needs_weights_that_moved_and_ranks_that_agree() -> None:
    def variant(name: str, by: float) -> Variant:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        return Variant(name, "", model, lambda: model.weight.data.add_(by))

    still = [variant("hpctrain", 0.0), variant("bare", 0.0)]
    with pytest.raises(MachineError, match="bare is nan of the way away"):
        verify(still, ALONE, "fp32", lambda step: None)

    def rank(comm: Any) -> str:
        apart = [variant("hpctrain", 1.0 + comm.rank)]
        with pytest.raises(MachineError, match="replicas have diverged") as caught:
            verify(apart, comm, "fp32", lambda step: None)
        return str(caught.value)

    assert len(set(run_group(2, rank))) == 1


def test_snapshot_is_a_copy() -> None:
    model = nn.Linear(2, 1)
    taken = snapshot(model)
    nn.init.zeros_(model.weight)
    assert taken.numel() == 3
    assert taken[:2].abs().sum() > 0
