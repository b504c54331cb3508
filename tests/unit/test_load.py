"""Loading configurations: layers, overrides, and a sentence with the place for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.config.load import config_hash, dump_config, load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(
        "model: {name: resnet18, zero_gamma: true}\ntrain: {epochs: 3, batch_per_worker: 8}\nschedule: {lr: 1e-1}\n"
    )
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_files_are_laid_over_what_they_extend(base: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    middle = tmp_path / "sub" / "middle.yaml"
    middle.write_text("extends: ../base.yaml\ntrain: {epochs: 5}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: sub/middle.yaml\nmodel: {fc_std: 0.01}\n")
    config = load_config(top, ["train.batch_per_worker=16"])
    assert config.model.model_dump() == {"name": "resnet18", "zero_gamma": True, "fc_std": 0.01, "he_init": True}
    assert (config.train.epochs, config.train.batch_per_worker) == (5, 16)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("schedule.lr=1e-4", 1e-4),
        ("schedule.lr=2E3", 2000.0),
        ("schedule.lr=.5", 0.5),
        ("schedule.lr=3", 3.0),
        ("train.max_steps=none", None),
        ("train.max_steps=null", None),
        ("train.max_steps=1_000", 1000),
        ("data.flip=false", False),
        ("data.path=2024-01-02", "2024-01-02"),
        ("data.path=/a=b", "/a=b"),
        ("data.path='1e-4'", "1e-4"),
        ("data.crop_area=[0.5, 1]", (0.5, 1.0)),
    ],
)
def test_override_values_are_yaml(base: Path, override: str, value: object) -> None:
    key = override.partition("=")[0]
    found: Any = load_config(base, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_an_override_opens_a_section_that_is_off_and_replaces_whole_sections(base: Path) -> None:
    config = load_config(base, ["train.early_stopping.patience=3", "model={name: dense}"])
    assert config.train.early_stopping is not None
    assert config.train.early_stopping.patience == 3
    assert config.model.name == "dense"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epoch=3", "train.epoch (--set train.epoch=3) is an unknown key; did you mean train.epochs?"),
        ("tarin.epochs=3", "tarin (--set tarin.epochs=3) is an unknown key; did you mean train?"),
        ("epochs=3", "epochs (--set epochs=3) is an unknown key; did you mean train.epochs?"),
        ("train.lr=1", "train.lr (--set train.lr=1) is an unknown key; did you mean schedule.lr?"),
        ("model.zero_gama=true", "did you mean model.zero_gamma?"),
        ("train.early_stopping.patienc=3", "did you mean train.early_stopping.patience?"),
        ("comm.xyzzy=3", "known here: comm.engine, comm.timeout_s, comm.startup_timeout_s, comm.horovod."),
        ("xyzzy=3", "known here: seed, model, data,"),
        (
            "model.name=resnet5",
            'model.name is "resnet5" (--set model.name=resnet5), but must be one of dense, resnet20',
        ),
        ("model={}", "model.name is missing in --set model={}; it is one of dense"),
        ("model=3", "model is 3 (--set model=3), but must be a section of keys."),
        ("data=", "data is null (--set data=), but must be a section of keys."),
        ("train.epochs=many", 'train.epochs is "many" (--set train.epochs=many), but must be a whole number.'),
        ("train.epochs=2.5", "train.epochs is 2.5 (--set train.epochs=2.5), but must be a whole number."),
        ("train.epochs=0", "train.epochs is 0 (--set train.epochs=0), but must be greater than 0."),
        ("schedule.lr=.nan", "schedule.lr is NaN (--set schedule.lr=.nan), but must be a finite number."),
        ("data.flip=3", "data.flip is 3 (--set data.flip=3), but must be true or false."),
        ("data.mean=3", "data.mean is 3 (--set data.mean=3), but must be a list."),
        ("data.std=[1,2]", "data.std.2 is missing in --set data.std=[1,2]."),
        ("train.precision=fp8", "but must be 'fp32', 'bf16' or 'fp16'."),
        ("schedule.warmup_epochs=9", "schedule.warmup_epochs is 9, longer than the training of 3 epochs"),
        ("data.crop_aspect=[2,1]", "data: crop_aspect is [2, 1]: put the smaller aspect first."),
        ("train.epochs", "--set train.epochs: write it as section.key=value."),
        ("train..epochs=3", "--set train..epochs=3: write it as section.key=value."),
        ("=3", "--set =3: write it as section.key=value."),
        (
            "seed=[1",
            "--set seed=[1: the value is not valid YAML: expected ',' or ']', but got '<stream end>' in line 1.",
        ),
    ],
)
def test_what_is_wrong_with_an_override_is_told(base: Path, override: str, sentence: str) -> None:
    assert sentence in complaint(base, override)


def test_without_a_file_the_overrides_stand_on_the_defaults() -> None:
    config = load_config(None, ["model.name=dense", "seed=3"])
    assert config == Config.model_validate({"model": {"name": "dense"}, "seed": 3})
    with pytest.raises(UserError, match=r"model.*the command line"):
        load_config(None, ["seed=3"])


def test_a_key_that_the_chosen_model_lacks_is_named_with_its_file(base: Path) -> None:
    text = complaint(base, "model.name=dense")
    assert text == (
        f"model.zero_gamma ({base}) is no key of the model dense: leave it out, "
        "or give the section whole with --set 'model={name: dense}'."
    )


def test_all_mistakes_are_listed_one_a_line(base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("extends: base.yaml\ntrain: {epochs: 0}\nsede: 3\n")
    lines = complaint(top, "data.image_size=big").splitlines()
    assert sorted(line.split()[0] for line in lines) == ["data.image_size", "sede", "train.epochs"]
    assert f"train.epochs is 0 ({top}), but must be greater than 0." in lines


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "must hold `key: value` lines, but its top level is a list"),
        ("just words\n", "its top level is a str"),
        ("model: {name: dense}\ntrain: {epochs: 3\nseed: 1\n", "is not valid YAML"),
        ("model: {name: dense}\ntrain:\n\tepochs: 3\n", "in line 3"),
        ("seed: 1\nmodel: {name: dense}\nseed: 2\n", "is not valid YAML: seed is given twice in line 3"),
        ("model: {name: dense}\ntrain: &a\n  epochs: *a\n", "found unconstructable recursive node in line 2"),
        ("model: {name: dense}\n---\nseed: 1\n", "expected a single document in the stream but found another"),
        ("model: {name: dense}\n? [a]\n: 3\n", "found unhashable key in line 2"),
        ("model: {name: dense}\n3: 4\n", "is an unknown key; known here: seed, model,"),
        ('model: {name: dense}\nx: "\\x00\x00"\n', "special characters are not allowed"),
        ("extends: [a.yaml]\n", "extends must name one file, but is ['a.yaml']"),
        ("extends: gone.yaml\n", "There is no configuration file"),
        ("extends: bad.yaml\n", "extends itself by way of"),
        ("seed: 1\n", "model is missing in"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = complaint(path)
    assert sentence in message
    assert len(message.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "gone.yaml") == f"There is no configuration file {tmp_path / 'gone.yaml'}."
    assert "Is a directory" in complaint(tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "it is not UTF-8 text" in complaint(tmp_path / "picture.yaml")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=120).filter(lambda text: text != "none")


@st.composite
def configs(draw: st.DrawFn) -> Config:
    models = st.one_of(
        st.fixed_dictionaries({"name": st.just("dense"), "neurons": st.integers(1, 9)}),
        st.fixed_dictionaries({"name": st.just("resnet50"), "fc_std": st.none() | st.floats(1e-9, 1.0)}),
    )
    return Config.model_validate(
        {
            "seed": draw(st.integers(0, 2**32 - 1)),
            "model": draw(models),
            "data": {"path": draw(st.none() | texts), "flip": draw(st.booleans())},
            "train": {"max_steps": draw(st.none() | st.integers(1, 10**9))},
            "schedule": {"lr": draw(st.floats(1e-30, 1e30)), "milestones": draw(st.just([]) | st.just([1.5, 2e7]))},
        }
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs())
def test_a_dumped_configuration_loads_back_equal(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    loaded = load_config(path)
    assert loaded == config
    assert config_hash(loaded) == config_hash(config)


def test_the_hash_follows_what_decides_the_result_alone(base: Path) -> None:
    plain = config_hash(load_config(base))
    assert len(plain) == 64
    told = ["log.every_steps=1", "comm.engine=mpi", "data.path=/elsewhere", "data.threads=3", "checkpoint.keep=1"]
    told += ["launch.max_requeues=3", "launch.signals=[TERM]", "data.log_samples=true", "checkpoint.mtbf_hours=24"]
    assert config_hash(load_config(base, told)) == plain
    for override in ("seed=7", "train.epochs=4", "data.loader=torch", "gradients.reduction=ordered"):
        assert config_hash(load_config(base, [override])) != plain


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_no_place(path: Path) -> None:
    config = load_config(path)
    assert config.parallel.virtual_workers is None
    if path.stem == "quickstart":
        assert config.data.path == "data/digits"
        assert load_config(path, ["model.name=dense"]).model.name == "dense"
    else:
        assert config.data.path is None
    assert path.read_text().startswith("#")
