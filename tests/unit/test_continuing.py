"""How a run is taken up again, as a line that a shell reads back word for word."""

from __future__ import annotations

import shlex
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hpctrain.launch.continuing import TrainCommand, in_run_dir

_WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(config=_WORDS, overrides=st.lists(_WORDS, max_size=3), run_dir=_WORDS)
def test_the_line_is_what_was_typed_with_the_run_directory(config: str, overrides: list[str], run_dir: str) -> None:
    told = TrainCommand(Path(config), tuple(overrides)).to_continue(Path(run_dir), {})
    sets = [word for override in overrides for word in ("--set", override)]
    expected = ["hpctrain", "train", str(Path(config)), *sets, "--run-dir", str(Path(run_dir))]
    assert shlex.split(told.removeprefix("to continue: ")) == expected


def test_in_a_slurm_job_its_script_is_told_the_directory() -> None:
    """The script types the line of the ranks, and takes the directory from its environment."""
    told = TrainCommand(Path("a.yaml")).to_continue(Path("my runs/a-7"), {"SLURM_JOB_ID": "7"})
    assert told == (
        "to continue, where the job is not requeued: HPCTRAIN_RUN_DIR='my runs/a-7' before the same sbatch or "
        "hpctrain submit line"
    )


def test_an_error_names_the_directory_as_the_next_start_takes_it() -> None:
    assert in_run_dir(Path("my runs/a"), {}) == "--run-dir 'my runs/a'"
    assert in_run_dir(Path("runs/a-7"), {"SLURM_JOB_ID": "7"}) == "HPCTRAIN_RUN_DIR=runs/a-7"
