"""The gradients benchmark: what is delivered and verified, who is told what, how ratios and words come about."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from hpctrain.bench.blocks import Sample
from hpctrain.bench.gradients import command, launching
from hpctrain.bench.gradients.contestants import pack_after_backward
from hpctrain.bench.gradients.delivery import Delivery, Noise, Prepared, tensor_list
from hpctrain.bench.gradients.groups import GROUPS, OURS, PEERS, group_named
from hpctrain.bench.gradients.measure import Bench, Contest, check, choose_ours, ratios_to_ours, sample_of
from hpctrain.bench.gradients.picture import draw_times
from hpctrain.bench.gradients.report import print_record, record_of
from hpctrain.bench.gradients.tuning import best_of, candidates, tuning_sentence, write_fragment
from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import HOROVODRUN, TORCHRUN, Topology, detect
from tests.unit.fake_group import run_group

CPU = torch.device("cpu")
TENSORS = [("layer.weight", (3, 5)), ("layer.norm.bias", (7,)), ("last.weight", (1 << 20, 2)), ("last.scale", ())]
KEYS = {"horovod_mpi_fp16", "horovod_gloo_fp16", "ddp_fp16_hook", "mpi4py_naive", "chainermn_style"}


def delivery_of(rank: int, world_size: int = 2) -> Delivery:
    return Delivery(Prepared.make(TENSORS, Noise(3, rank, world_size, CPU), CPU))


def config_of(*overrides: str) -> Config:
    return load_config(None, ["model={name: dense, neurons: 4}", *overrides])


# delivery


def test_resnet50_has_161_tensors() -> None:
    tensors = tensor_list(load_config(None, ["model.name=resnet50"]))
    assert len(tensors) == 161
    assert sum(math.prod(shape) for _, shape in tensors) == 25_557_032
    assert tensors[0] == ("conv1.weight", (64, 3, 7, 7))


def test_gradients_arrive_in_reverse_order_and_are_not_copied() -> None:
    delivery = delivery_of(0)
    assert [name for name, _ in delivery.named_parameters()] == [name for name, _ in TENSORS]
    arrived: list[int] = []
    for parameter in delivery.ordered:
        parameter.register_post_accumulate_grad_hook(lambda parameter: arrived.append(id(parameter)))  # type: ignore
    for step in (1, 2):
        delivery.prepare(step)
        delivery().backward()
        for parameter, gradient in zip(delivery.ordered, delivery.prepared.gradients, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == gradient.data_ptr()
            assert parameter.grad.shape == parameter.shape
    assert arrived == 2 * [id(parameter) for parameter in reversed(delivery.ordered)]


def test_every_rank_knows_the_mean_of_all() -> None:
    deliveries = [delivery_of(rank, 3) for rank in range(3)]
    for delivery in deliveries:
        delivery.prepare(5)
        delivery().backward()
    means = [
        sum(cast(torch.Tensor, delivery.ordered[index].grad).double() for delivery in deliveries) / 3
        for index in range(len(TENSORS))
    ]
    for delivery in deliveries:
        for parameter, mean in zip(delivery.ordered, means, strict=True):
            parameter.grad = cast(torch.Tensor, mean).float()
        assert delivery.worst(5)[0] < 1e-6
        # Nothing is left from the step before.
        assert delivery.worst(4)[0] > 0.1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda grad: None,
        lambda grad: grad * 2,
        lambda grad: torch.where(torch.arange(grad.numel()).view_as(grad) == 3, math.nan, grad),
        lambda grad: torch.zeros_like(grad),
        lambda grad: grad.flip(0),
    ],
)
def test_a_wrong_tensor_is_found_and_named(spoil: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    delivery = delivery_of(0, 1)
    delivery.prepare(1)
    delivery().backward()
    assert delivery.worst(1)[0] == 0.0
    victim = delivery.ordered[1]
    victim.grad = spoil(cast(torch.Tensor, victim.grad))
    apart, name = delivery.worst(1)
    assert name == "layer.norm.bias"
    with pytest.raises(MachineError, match=r"ddp \(fp16\) is wrong: the mean of layer.norm.bias is"):
        check("ddp (fp16)", name, apart, 1e-2)


def test_the_flat_buffer_gives_the_mean() -> None:
    def rank(comm: Any) -> list[float]:
        delivery, found = delivery_of(comm.rank), []
        for step, dtype in enumerate((torch.float32, torch.float16)):
            finish = pack_after_backward(delivery, comm, dtype)
            delivery.prepare(step)
            finish(delivery())
            found.append(delivery.worst(step)[0])
        return found

    for wide, narrow in run_group(2, rank):
        assert wide < 1e-6
        assert 1e-5 < narrow < 1e-3


# processes


def test_groups_are_told_apart_and_carry_the_keys() -> None:
    assert len({group.name for group in GROUPS}) == len(GROUPS) == 8
    assert {group.key for group in PEERS} == KEYS
    assert [group.name for group in OURS] == ["hpctrain_horovod", "hpctrain_mpi", "hpctrain_torch"]


@pytest.mark.parametrize(("table", "launcher"), [(HOROVODRUN, "horovodrun"), (TORCHRUN, "torchrun")])
def test_a_rank_started_directly_knows_its_place(table: Any, launcher: str) -> None:
    place = detect(launching.rank_environment(table, 2, 3), "here")
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (2, 3, 2, 3)
    assert (place.node_rank, place.num_nodes, place.launcher) == (0, 1, launcher)


def test_foreign_launchers_are_forgotten_and_settings_kept() -> None:
    around = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_FILE_LOCATION": "/tmp/x",
        "PMIX_NAMESPACE": "x",
        "SLURM_JOB_ID": "7",
        "HOROVOD_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "2",
        "PATH": "/bin",
        "OMPI_MCA_coll": "^han",
        "PRTE_MCA_x": "y",
        "HOROVOD_FUSION_THRESHOLD": "1",
        "PYTHONPATH": "/there",
    }
    kept = launching.base_environment(around, 10_000)
    assert detect(kept, "here").launcher == "none"
    assert set(kept) - {"OMP_NUM_THREADS", "PYTHONUNBUFFERED"} == {
        "PATH", "OMPI_MCA_coll", "PRTE_MCA_x", "HOROVOD_FUSION_THRESHOLD", "PYTHONPATH",
    }  # fmt: skip
    assert kept["OMP_NUM_THREADS"] == "1"
    assert kept["PYTHONPATH"].endswith(":/there")
    assert launching.base_environment({"OMP_NUM_THREADS": "3"}, 1)["OMP_NUM_THREADS"] == "3"


def test_open_mpi_is_told_of_root_and_of_too_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert launching.mpi_environment(2, 2) == {}
    assert launching.mpi_environment(3, 2)["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert set(launching.mpi_environment(2, 2)) == {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}


def test_a_missing_mpirun_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_which", lambda program: None)
    assert launching.missing_launcher(group_named("mpi4py_naive")) == "mpirun is not on PATH"
    assert launching.missing_launcher(group_named("ddp")) is None


# figures


def test_an_exchange_lasts_from_the_last_begin_to_the_last_end() -> None:
    answers = [
        {"began": [0.0, 10.0], "ended": [1.0, 11.0], "cpu_s": 0.5},
        {"began": [0.5, 10.0], "ended": [0.9, 14.0], "cpu_s": 1.5},
    ]
    assert sample_of(answers, 2) == Sample(step_s=(0.5 + 4.0) / 2, cpu_s=1.0)


def company(*names: str, absent: dict[str, str] | None = None) -> Any:
    told = {name: {"delivery_s": 0.001, "versions": {"lib": "1"}, "device": "cpu"} for name in names}
    return SimpleNamespace(crews=dict.fromkeys(names), told=told, absent=absent or {}, ranks=2)


def test_ours_is_what_auto_would_take_or_what_is_asked_for() -> None:
    assert choose_ours("auto", company("ddp", "hpctrain_torch", "hpctrain_horovod")) == "hpctrain_horovod"
    assert choose_ours("auto", company("ddp", "hpctrain_torch")) == "hpctrain_torch"
    assert choose_ours("torch", company("hpctrain_torch", "hpctrain_horovod")) == "hpctrain_torch"
    with pytest.raises(UserError, match="comm.engine=mpi gives no exchange of ours .*mpi4py is not here"):
        choose_ours("mpi", company("hpctrain_torch", absent={"hpctrain_mpi": "mpi4py is not here"}))


def test_ours_takes_the_configured_format_and_peers_fp16() -> None:
    def compression(asked: str, name: str, form: str) -> str:
        config = config_of()
        gradients = config.gradients.model_copy(update={"compression": asked})
        bench = Bench(config.model_copy(update={"gradients": gradients}), company("hpctrain_torch"))
        return bench.compression_of(Contest(name, form))

    assert compression("none", "hpctrain_torch", "fp16") == "fp16"
    assert compression("bf16", "hpctrain_torch", "fp16") == "bf16"
    assert compression("bf16", "ddp", "fp16") == "fp16"
    assert compression("bf16", "hpctrain_torch", "fp32") == "none"


def of(*step_s: float) -> list[Sample]:
    return [Sample(seconds, 2 * seconds) for seconds in step_s]


def bench_and_samples() -> tuple[Bench, dict[Contest, list[Sample]]]:
    bench = Bench(config_of(), company("hpctrain_torch", "ddp", absent={"mpi4py_naive": "mpi4py is not installed"}))
    samples = {
        Contest("hpctrain_torch", "fp16"): of(1.0, 2.2, 2.0),
        Contest("ddp", "fp16"): of(1.5, 3.3, 3.0),
        Contest("hpctrain_torch", "fp32"): of(2.0, 2.0, 2.0),
    }
    bench.verified = {contest: {"apart": 3e-4, "tensor": "x", "how": "somehow"} for contest in samples}
    return bench, samples


def test_ratios_are_taken_within_rounds() -> None:
    _, samples = bench_and_samples()
    keys = {"ddp_fp16_hook": "ddp", "mpi4py_naive": "mpi4py_naive"}
    assert ratios_to_ours(samples, "hpctrain_torch", "fp16", keys) == {"ddp_fp16_hook": pytest.approx([1.5] * 3)}
    assert ratios_to_ours(samples, "hpctrain_torch", "fp32", keys) == {}
    assert ratios_to_ours(samples, "hpctrain_mpi", "fp16", keys) == {}


def test_the_record_the_table_and_the_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = record_of(*bench_and_samples(), rounds=3)
    assert record["ratios"]["ddp_fp16_hook"]["median"] == pytest.approx(1.5)
    assert record["ratios"]["ddp_fp16_hook"]["rounds"] == pytest.approx([1.5] * 3)
    assert record["ratios_fp32"] == {}
    assert record["variants"]["ddp"]["fp16"]["samples"]["cpu_s"] == [3.0, 6.6, 6.0]
    assert record["unavailable"] == {"mpi4py_naive": "mpi4py is not installed"}
    assert record["verified"]["apart"] == {
        "fp16": {"hpctrain_torch": 3e-4, "ddp": 3e-4},
        "fp32": {"hpctrain_torch": 3e-4},
    }
    assert record["variants"]["ddp"]["fp16"]["how"] == "somehow"
    assert record["sentence"] == (
        "hpctrain over torch.distributed exchanges the 4 gradients of dense (0.6 M) on 2 ranks (cpu) in "
        "2000.0 ms in fp16, where the others take times as long: DDP 1.50 (1.50 to 1.50); in 2000.0 ms in fp32; "
        "mpi4py_naive was not measured: mpi4py is not installed."
    )
    print_record(record)
    shown = capsys.readouterr().out
    assert record["sentence"] in shown
    assert "ddp: DistributedDataParallel" in shown
    draw_times(tmp_path / "times.png", record)
    with Image.open(tmp_path / "times.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] >= 1200


# tuning


def test_sizes_that_make_one_bucket_are_tried_once() -> None:
    configured = {"bucket_mib": 16.0, "last_bucket_mib": 1.0}
    tried = candidates("bucket_mib", configured, configured, 9 << 20)
    assert [found["bucket_mib"] for found in tried] == [16.0, 1.0, 2.0, 4.0, 8.0]
    assert {found["last_bucket_mib"] for found in tried} == {1.0}
    assert candidates("bucket_mib", configured, configured, 1 << 30)[-1]["bucket_mib"] == 64.0
    tried = candidates("last_bucket_mib", configured | {"bucket_mib": 2.0}, configured, 9 << 20)
    assert tried[0] == configured
    assert [found["last_bucket_mib"] for found in tried[1:]] == [1.0, 0.25, 0.5, 2.0]
    assert {found["bucket_mib"] for found in tried[1:]} == {2.0}


def test_the_best_is_found_within_rounds() -> None:
    best, spreads = best_of([of(1.0, 3.0, 1.0), of(1.1, 2.4, 0.8), of(2.0, 2.9, 2.0)])
    assert best == 1
    assert spreads[0].median == 1.0
    assert spreads[1].median == pytest.approx(0.8)


def test_the_fragment_can_be_extended(tmp_path: Path) -> None:
    row = {"step_s": {"median": 0.02}, "to_configured": {"median": 0.8, "p5": 0.7, "p95": 0.9}}
    tuning = {
        "compression": "fp16",
        "reduction": "engine",
        "best": {"bucket_mib": 4.0},
        "candidates": [{"bucket_mib": 1.0, **row}, {"bucket_mib": 4.0, **row}],
    }
    fragment = tmp_path / "x_tuned.yaml"
    write_fragment(fragment, tuning, {"model": {"name": "resnet50"}, "ranks": 2, "device": "cpu"})
    (tmp_path / "run.yaml").write_text("extends: x_tuned.yaml\nmodel: {name: dense}\n")
    assert load_config(tmp_path / "run.yaml").gradients.bucket_mib == 4.0
    assert "fastest with gradients.bucket_mib=4: 20.0 ms, 0.800 (0.700 to 0.900) of the time as configured" in (
        tuning_sentence(tuning, fragment)
    )


# what is refused


def asked(folder: Path, **changes: Any) -> command.Asked:
    return command.Asked(
        **{"ranks": None, "rounds": 1, "json_file": folder / "x.json", "picture": None, "tune": False} | changes
    )


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "gathered", lambda *_: pytest.fail("processes were started"))


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": True, "json_file": None}, "--tune writes beside the JSON file: name one with --json"),
        ({"json_file": Path("/absent/x.json")}, "the folder of /absent/x.json does not exist"),
        ({"picture": Path("/absent/x.png")}, "the folder of /absent/x.png does not exist"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        command.bench_gradients_command(None, [], None, asked(tmp_path, **changes))


@pytest.mark.usefixtures("_nothing_runs")
def test_an_unknown_net_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resnet51"):
        command.bench_gradients_command(None, [], "resnet51", asked(tmp_path))


def test_a_launcher_tells_the_number_of_ranks() -> None:
    mpirun = Topology(rank=0, world_size=4, local_rank=0, local_size=4, launcher="mpirun")
    assert command.count_ranks(None, Topology()) == 2
    assert command.count_ranks(3, Topology()) == 3
    assert command.count_ranks(None, mpirun) == command.count_ranks(4, mpirun) == 4
    with pytest.raises(UserError, match="--ranks is 2, but mpirun has started 4: leave one of them out"):
        command.count_ranks(2, mpirun)
    with pytest.raises(UserError, match="mpirun has started 2 of 4 ranks here: start it by itself with --ranks 2"):
        command.count_ranks(None, replace(mpirun, local_size=2))


@pytest.mark.usefixtures("_nothing_runs")
def test_other_ranks_of_a_launcher_have_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    command.bench_gradients_command(None, [], None, asked(tmp_path))
