"""From a configuration to parts: the same model on all ranks, the options that were asked for, the data of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.data.index import Index
from hpctrain.errors import UserError
from hpctrain.metrics.record import parameters_sha256
from hpctrain.train import build
from hpctrain.train.build import Feeds, build_feeds, build_net, build_parts, open_data, plan_for
from hpctrain.train.state import Progress
from tests.needs import needs
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.small_runs import alone, parts_of, plan_of, recipe, session_of


def feeds_of(**sections: Any) -> Feeds:
    config, session = recipe(**sections), session_of(alone())
    dataset = open_data(session.comm, config)
    plan = plan_for(config, dataset, session.comm.topology)
    return build_feeds(build_parts(config, plan, session), dataset, session)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    def digest(seed: int) -> str:
        config = recipe().model_copy(update={"seed": seed})
        return parameters_sha256(build_net(config, plan_of(config), torch.device("cpu")).named_parameters())

    assert digest(1) == digest(1) != digest(2)


def test_all_ranks_start_with_the_values_of_the_first() -> None:
    """Even where their own would differ; ranks as threads draw from one generator."""
    config = recipe(model={"name": "resnet20"}, train={"batch_per_worker": 2})
    digests = run_group(3, lambda comm: parameters_sha256(dict(parts_of(config, comm).model.state_dict()).items()))
    assert len(set(digests)) == 1


def test_options_of_training_reach_their_parts() -> None:
    plain, asked = (
        parts_of(recipe()),
        parts_of(
            recipe(
                train={"label_smoothing": 0.2, "ema_decay": 0.9, "precision": "fp16"},
                gradients={"reduction": "ordered"},
                optimizer={"name": "adam"},
            )
        ),
    )
    assert (plain.ema, plain.loss_scale) == (None, None)
    assert isinstance(plain.criterion, torch.nn.CrossEntropyLoss) and plain.criterion.label_smoothing == 0
    assert isinstance(asked.criterion, torch.nn.CrossEntropyLoss) and asked.criterion.label_smoothing == 0.2
    assert asked.ema is not None and asked.ema.decay == 0.9
    assert asked.loss_scale is not None and asked.gradient_scale == 1 / 2**16
    assert isinstance(asked.optimizer, torch.optim.Adam)


def test_buckets_have_the_size_asked_for() -> None:
    def buckets(bucket_mib: float) -> int:
        config = recipe(
            model={"hidden_layers": 3, "neurons": 64},
            train={"batch_per_worker": 4},
            gradients={"bucket_mib": bucket_mib},
        )
        return run_group(2, lambda comm: len(parts_of(config, comm).exchange.buffers))[0]

    assert buckets(16) == 1
    assert buckets(0.01) > 1


def test_batches_begin_where_the_progress_stands() -> None:
    whole = [batch.request.sample_ids.tolist() for batch in feeds_of().train_batches(Progress())]
    assert len(whole) == 4 * 12
    later = Progress(step=15, epoch=1, position=24)
    rest = [batch.request.sample_ids.tolist() for batch in feeds_of().train_batches(later)]
    assert rest == whole[15:]


def test_evaluation_judges_the_average_and_gives_the_parameters_back() -> None:
    feeds = feeds_of(train={"ema_decay": 0.5})
    parts = feeds.parts
    assert parts.ema is not None
    average = feeds.evaluate()
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.mul_(-50)
    before = parameters_sha256(parts.model.named_parameters())
    assert feeds.evaluate() == average, "the average has not moved"
    assert parameters_sha256(parts.model.named_parameters()) == before


def test_threads_default_to_the_cores_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    make = build.make_loader

    def noting(config: Any, index: Index, **options: Any) -> Any:
        asked.append((options["threads"], options["batch_size"]))
        return make(config, index, **options)

    monkeypatch.setattr(build, "make_loader", noting)
    feeds_of(data={"threads": None})
    feeds_of(data={"threads": 5})
    assert asked == [(1, 8), (1, 8), (5, 8), (5, 8)]


def test_digits_are_made_where_they_are_absent(tmp_path: Path) -> None:
    needs("sklearn")
    data = {"loader": "torch", "path": str(tmp_path / "digits"), "builtin": "digits", "num_classes": None}

    def opened(comm: FakeCommunicator) -> tuple[int, int]:
        dataset = open_data(comm, recipe(data=data))
        return len(dataset.train), len(dataset.val)

    assert run_group(2, opened) == [(1438, 359)] * 2
    made = (tmp_path / "digits" / "dataset.json").stat().st_mtime_ns
    assert run_group(2, opened) == [(1438, 359)] * 2
    assert (tmp_path / "digits" / "dataset.json").stat().st_mtime_ns == made


def test_a_folder_that_is_there_is_not_filled_with_digits(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    data = {"loader": "torch", "path": str(tmp_path / "mine"), "builtin": "digits", "num_classes": None}
    with pytest.raises(UserError, match="holds no class folders"):
        open_data(alone(), recipe(data=data))
    assert list((tmp_path / "mine").iterdir()) == []
