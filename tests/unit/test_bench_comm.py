"""`bench comm` without a launcher: sizes, factors, exact checks, a wrong result, the record and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.bench.comm import measure, operations
from hpctrain.bench.comm.command import measure as measure_all
from hpctrain.bench.comm.measure import Bench, Cell, _portions, cells_of
from hpctrain.bench.comm.operations import OPERATIONS, SUMMED_DTYPES, Case, all_cases
from hpctrain.bench.comm.pattern import PERIOD, Pattern, Wrong, sent_by, summand, total
from hpctrain.bench.comm.report import print_tables, sentence
from hpctrain.bench.comm.sizes import ladder, parse_size, tell
from hpctrain.config.load import load_config
from hpctrain.errors import MachineError, UserError
from hpctrain.gradients.reduction import EngineReduction
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.small_runs import command, session_of

CPU = torch.device("cpu")
DTYPES = list(SUMMED_DTYPES)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8", 8), ("8B", 8), ("64KiB", 65536), (" 128 MiB ", 128 << 20), ("1gib", 1 << 30), ("0", 0)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size("--min-size", text) == size


@settings(deadline=None)
@given(st.integers(1, 2**40))
def test_a_size_that_was_told_is_read_again(size: int) -> None:
    assert parse_size("--min-size", tell(size)) == size


@pytest.mark.parametrize("text", ["", "KiB", "1.5KiB", "8MB", "-8", "1e3", "8 8"])
def test_what_is_no_size_is_refused(text: str) -> None:
    expected = f"--max-size is {text!r}, which is no size: write a whole number with B, KiB, MiB or GiB, as 64KiB"
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_size("--max-size", text)


def test_the_ladder_ends_at_the_largest_size() -> None:
    assert ladder("8B", "128MiB") == [8 * 4**step for step in range(13)]
    assert ladder("64KiB", "1000000") == [65536, 262144, 1000000]
    assert ladder("1MiB", "1MiB") == [1 << 20]


@pytest.mark.parametrize(("world_size", "all_reduce", "others"), [(2, 1.0, 0.5), (4, 1.5, 0.75), (8, 1.75, 0.875)])
def test_bus_factors_are_those_of_nccl_tests(world_size: int, all_reduce: float, others: float) -> None:
    found = {name: operation.bus_factor(world_size) for name, operation in OPERATIONS.items()}
    parts = dict.fromkeys(("reduce_scatter", "all_gather", "all_to_all"), others)
    assert found == {"all_reduce": all_reduce, **parts, "broadcast": 1.0}
    assert OPERATIONS["all_reduce"].steps(world_size) == 2 * (world_size - 1)


@settings(deadline=None)
@given(st.sampled_from(all_cases(DTYPES)), st.integers(8, 1 << 20), st.integers(2, 64))
def test_buffers_are_the_next_length_that_divides(case: Case, size: int, world_size: int) -> None:
    elements = case.elements(size, world_size)
    itemsize = case.torch_dtype.itemsize
    granule = {"engine": world_size if OPERATIONS[case.operation].in_parts else 1}.get(case.algorithm, 16 * world_size)
    if elements is None:
        assert size < granule * itemsize
        return
    assert elements % granule == 0
    assert size <= elements * itemsize < size + granule * itemsize


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.sampled_from(DTYPES), st.integers(1, 3 * PERIOD))
def test_summands_add_up_exactly_in_any_order(world_size: int, dtype: str, size: int) -> None:
    gathered = []
    for rank in range(world_size):
        mine = torch.zeros(size, dtype=SUMMED_DTYPES[dtype])
        summand(world_size, rank, mine.dtype, CPU).fill(mine)
        gathered.append(mine)
    expected = torch.zeros_like(gathered[0])
    total(world_size, expected.dtype, CPU).fill(expected)
    assert expected.double().equal(torch.stack(gathered).double().sum(0))
    for order in (gathered, gathered[::-1]):
        found = torch.zeros_like(expected)
        for mine in order:
            found += mine
        assert found.equal(expected)


def test_sums_that_would_round_are_refused() -> None:
    assert summand(1922, 0, torch.float16, CPU)
    text = "sums over 1923 ranks cannot be checked exactly in float16, at most 1922 can: leave this dtype out"
    with pytest.raises(UserError, match=text):
        summand(1923, 0, torch.float16, CPU)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200_000), st.integers(0, 100_000), st.integers(1, 9000), st.data())
def test_a_pattern_fills_from_anywhere_and_finds_what_differs(
    size: int, start: int, period: int, data: st.DataObject
) -> None:
    values = torch.arange(period, dtype=torch.int32)
    pattern, buffer = Pattern(values), torch.empty(size, dtype=torch.int32)
    pattern.fill(buffer, start)
    assert buffer.equal(((torch.arange(size) + start) % period).to(torch.int32))
    assert pattern.find_wrong(buffer, start) is None
    places = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=3)))
    was = buffer[places[0]].item()
    buffer[places] = -1
    assert pattern.find_wrong(buffer, start) == Wrong(len(places), places[0], -1, was)


def test_the_pattern_finds_nan() -> None:
    pattern, buffer = Pattern(torch.ones(3)), torch.ones(7)
    buffer[4] = float("nan")
    found = pattern.find_wrong(buffer)
    assert found is not None and (found.count, found.index) == (1, 4)


def test_what_ranks_send_differs_at_every_place() -> None:
    sent = torch.stack([torch.zeros(1000, dtype=torch.int32) for _ in range(4)])
    for rank, row in enumerate(sent):
        sent_by(rank, CPU).fill(row)
    assert sent.unique().numel() == 4000


def bench_of(comm: FakeCommunicator, max_bytes: int = 1 << 14) -> Bench:
    return Bench(comm, max_bytes, tick=lambda: None)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_operation_is_right_on_a_right_engine(world_size: int) -> None:
    def rank(comm: FakeCommunicator) -> None:
        for cell in cells_of(all_cases(DTYPES), [8, 1000, 8192], world_size):
            with bench_of(comm).opened(cell) as operation:
                operation.run()
                assert operation.find_wrong() is None, cell
                operation.refill()
                has_it_already = cell.case.operation == "broadcast" and comm.rank == 0
                assert has_it_already or operation.find_wrong() is not None, f"{cell}: what was not done is not right"
                for _ in range(3):
                    operation.run()

    run_group(world_size, rank, hosts=["here"] * world_size)


def test_what_needs_shared_memory_is_refused_where_there_is_none() -> None:
    cell = Cell(Case("all_reduce", operations.SHARED, "fp32"), 256, 64)
    refusals = run_group(2, lambda comm: bench_of(comm).try_out(cell))
    assert refusals == ["the ranks share no memory: the ranks sit on 2 hosts"] * 2


def test_a_reduction_is_closed_after_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(EngineReduction, "close", lambda self: closed.append(self.comm.rank))

    def rank(comm: FakeCommunicator) -> None:
        bench, cell = bench_of(comm), Cell(Case("all_reduce", "engine", "fp32"), 256, 64)
        runs = bench.try_out(cell)
        assert isinstance(runs, int) and bench.block(cell, 1) > 0

    run_group(2, rank)
    assert sorted(closed) == [0, 0, 1, 1]


class HalfDone(EngineReduction):
    """Forgets the last element on rank 1."""

    def wait(self) -> None:
        super().wait()
        if self.comm.rank == 1:
            self.buffer[-1] += 1


@pytest.fixture
def half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations.REDUCTIONS, "half_done", HalfDone)


@pytest.mark.usefixtures("half_done")
def test_a_wrong_result_ends_it_on_every_rank_and_names_operation_size_and_rank() -> None:
    def rank(comm: FakeCommunicator) -> list[str]:
        bench, cell = bench_of(comm), Cell(Case("all_reduce", "half_done", "fp16"), 4096, 2048)
        texts = []
        for attempt in (lambda: bench.try_out(cell), lambda: bench.block(cell, 1)):
            with pytest.raises(MachineError) as caught:
                attempt()
            texts.append(str(caught.value))
        return texts

    expected = (
        "all_reduce of fp16 by half_done is wrong at 4 KiB: rank 1 has 1 wrong elements, at 2047 it is 18 instead "
        "of 17; no figures are given"
    )
    assert run_group(2, rank) == [[expected] * 2] * 2


HERE = ["here"] * 2


class OneDtype(FakeCommunicator):
    def all_reduce_(self, buffer: Any, op: Any = "sum") -> Any:
        if buffer.dtype == torch.bfloat16:
            raise UserError("the fake engine cannot reduce bfloat16: use another")
        return super().all_reduce_(buffer, op)


def record_of(sizes: list[int], dtypes: list[str], rounds: int = 3) -> dict[str, Any]:
    config = load_config(None, ["model.name=dense", "seed=7"])

    def rank(comm: FakeCommunicator) -> dict[str, Any]:
        restricted = OneDtype(comm.group, comm.rank, HERE)
        return measure_all(config, session_of(restricted), sizes, dtypes, rounds, lambda done: None)

    records = run_group(2, rank, HERE)
    for record in records:
        json.dumps(record, allow_nan=False)
    first, other = records
    assert first["cases"] == other["cases"], "all ranks tell the time of the slowest"
    return first


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BLOCK_S", 1e-4)


@pytest.mark.usefixtures("short_blocks")
def test_the_record_has_every_sample_bandwidths_and_a_fit_for_each_case() -> None:
    record = record_of([64, 1024], ["fp32", "fp16"])
    names = [(case["operation"], case["algorithm"], case["dtype"]) for case in record["cases"]]
    assert names == [(case.operation, case.algorithm, case.dtype) for case in all_cases(["fp32", "fp16"])]
    for case in record["cases"]:
        for row in case["sizes"]:
            assert len(row["samples"]["time_s"]) == 3
            assert row["algbw_gb_per_s"] == pytest.approx(row["size_bytes"] / row["time_s"]["median"] / 1e9)
            assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"] * case["bus_factor"])
    # Only 1,024 B are left of ordered's sizes, too few for a line.
    with_fit = {(one["operation"], one["algorithm"], one["dtype"]) for one in record["fit"]}
    assert with_fit == {name for name in names if name[1] == "engine"} | {
        name for name in names if name[1] != "engine" and name[2] == "fp16"
    }
    for one in record["fit"]:
        assert (one["engine"], one["world_size"], one["hosts"]) == ("fake", 2, 1)
        assert one["alpha_s"] >= 0 and one["beta_s_per_byte"] >= 0
    assert record["provenance"]["steal_share"] is not None
    assert "every result was exact." in record["sentence"], "what the machine lost to others may follow"


@pytest.mark.usefixtures("short_blocks")
def test_what_an_engine_cannot_do_is_told_and_the_rest_is_measured() -> None:
    record = record_of([256], ["bf16"], rounds=1)
    reason = "the fake engine cannot reduce bfloat16: use another"
    assert record["unavailable"].pop("all_reduce of bf16 by engine") == reason
    assert set(record["unavailable"]) <= {"all_reduce of bf16 by grid"}
    assert ("all_reduce", "ordered") in {(case["operation"], case["algorithm"]) for case in record["cases"]}
    assert re.search(rf"; not measured: all_reduce of bf16 by engine.* \({reason}\)\.$", record["sentence"])
    assert record["fit"] == []


@pytest.mark.usefixtures("short_blocks")
def test_sizes_that_are_rounded_up_stay_in_the_row_that_was_asked_for() -> None:
    config = load_config(None, ["model.name=dense"])

    def rank(comm: FakeCommunicator) -> dict[str, Any]:
        return measure_all(config, session_of(comm), [4096], ["fp16"], 1, lambda done: None)

    record = run_group(3, rank, hosts=["here"] * 3)[0]
    by_name = {case["algorithm"]: case["sizes"] for case in record["cases"] if case["operation"] == "all_reduce"}
    assert {name: [(row["asked_bytes"], row["size_bytes"]) for row in rows] for name, rows in by_name.items()} == {
        name: [(4096, 4096 if name == "engine" else 4128)] for name in (*operations.REDUCTIONS, operations.SHARED)
    }
    out = io.StringIO()
    with redirect_stdout(out):
        print_tables(record)
    (row,) = [line for line in out.getvalue().split("reduce_scatter")[0].splitlines() if "4 KiB" in line]
    assert len(row.split()) == 2 + 3 * len(by_name)


def test_stolen_time_is_told() -> None:
    record = record_of([256], ["fp32"], rounds=1)
    record["provenance"]["steal_share"] = 0.034
    assert "3.4% of this machine's CPU time went to others meanwhile: measure again." in sentence(record)


def test_runs_are_cut_before_values_overflow() -> None:
    def rank(comm: FakeCommunicator) -> None:
        buffer = torch.zeros(1 << 16, dtype=torch.float16)
        operation = operations.prepare(Case("all_reduce", "engine", "fp16"), comm, buffer, buffer)
        most = operation.most_runs()
        assert most == 9
        operation.refill()
        for _ in range(most):
            operation.run()
        assert buffer.isfinite().all()
        operation.run()
        assert buffer.isinf().any()

    run_group(2, rank)
    assert _portions(20, 9) == [9, 9, 2]
    assert _portions(20, None) == [20]
    assert list(itertools.accumulate(_portions(1, 9))) == [1]


def test_a_buffer_larger_than_the_memory_is_refused() -> None:
    def rank(comm: FakeCommunicator) -> None:
        text = r"messages of 65536 GiB need [\d.]+ GiB on host host0, which has [\d.]+ GiB free: lower --max-size"
        with pytest.raises(UserError, match=text):
            bench_of(comm, 1 << 46)

    run_group(2, rank)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--min-size", "1KiB", "--max-size", "8B"], "--min-size is 1 KiB, above --max-size, which is 8 B: swap them"),
        (["--min-size", "4B"], "--min-size is 4 B, but the smallest message is 8 B: raise it"),
        (["--max-size", "8 MB"], "--max-size is '8 MB', which is no size: write .*"),
        (["--dtype", "fp64"], "--dtype fp64 is not known: choose one of fp32, fp16, bf16"),
        (["--json", "/absent/x.json"], "the folder of /absent/x.json does not exist: make it, or name another file"),
        (["--json", "/tmp"], "/tmp cannot be written: name another file"),
        (["--set", "comm.engin=mpi"], r"comm\.engin .* is an unknown key; did you mean comm\.engine\?"),
        (["absent.yaml"], r"There is no configuration file absent\.yaml\."),
        (
            [],
            "bench comm measures what passes between ranks, and this job has one: start it with horovodrun -np 2, "
            "mpirun -np 2 or torchrun --no-python --nproc-per-node 2",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(argv: list[str], told: str) -> None:
    done = command("bench", "comm", *argv)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"hpctrain: {told}\n", done.err), done.err


def test_a_json_file_in_a_folder_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write where others may not
    done = command("bench", "comm", "--json", tmp_path / "x.json")
    assert (done.code, done.err) == (2, f"hpctrain: {tmp_path}/x.json cannot be written: name another file\n")
