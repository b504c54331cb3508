"""Slurm's ways to write a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.launch.durations import seconds_of


@given(st.integers(0, 40), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_all_forms_of_one_time_are_as_long(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    forms = [f"{days}-{hours}:{minutes}:{seconds}", f"{days * 24 + hours}:{minutes:02d}:{seconds:02d}"]
    forms.append(f"{(days * 24 + hours) * 60 + minutes}:{seconds}")
    for form in forms if total else ():
        assert seconds_of(form, "--time") == total


@pytest.mark.parametrize(("text", "seconds"), [("90", 5400), ("2-00", 172800), ("1-06:30", 109800), ("00:10", 10)])
def test_examples(text: str, seconds: int) -> None:
    assert seconds_of(text, "--time") == seconds


@pytest.mark.parametrize("text", ["", "0", "1h", "12:00:00:00", "-5", "1-", "two", "1:2:3 ", "infinite"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time is .* but must be a time as Slurm writes it, such as 90"):
        seconds_of(text, "--time")
