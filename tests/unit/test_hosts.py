"""Lists of hosts as Slurm writes them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.topology.hosts import first_host, hosts

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,6}(\.[a-z]+)?", fullmatch=True)
WIDTHS = st.integers(1, 5)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A part of a bracket and the numbers it stands for."""
    width, first, more = draw(WIDTHS), draw(st.integers(0, 1200)), draw(st.integers(0, 4))
    numbers = [str(number).zfill(width) for number in range(first, first + more + 1)]
    alone = more == 0 and draw(st.booleans())
    return numbers[0] if alone else f"{numbers[0]}-{first + more}", numbers


@st.composite
def entries(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One name with up to two brackets, and what it stands for."""
    text = draw(NAMES)
    names = [text]
    for _ in range(draw(st.integers(0, 2))):
        parts = draw(st.lists(ranges(), min_size=1, max_size=3))
        suffix = draw(st.sampled_from(["", "x", "-ib", "r"]))
        text += f"[{','.join(part for part, _ in parts)}]{suffix}"
        names = [name + number + suffix for name in names for _, numbers in parts for number in numbers]
    return text, names


@given(st.lists(entries(), min_size=1, max_size=4))
def test_every_form_is_spelt_out_in_order(parts: list[tuple[str, list[str]]]) -> None:
    names = [name for _, expanded in parts for name in expanded]
    nodes = ",".join(text for text, _ in parts)
    assert list(hosts(nodes)) == names
    assert first_host(nodes) == names[0]


@given(st.text(st.sampled_from("ab[]-,0123 \n"), max_size=12))
def test_a_text_is_names_or_an_error(nodes: str) -> None:
    try:
        names = list(hosts(nodes))
    except UserError:
        return
    assert all(re.fullmatch(r"[^\[\],\s]+", name) for name in names)
    assert bool(names) == bool(nodes)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("a[01-03,7],b-2", ["a01", "a02", "a03", "a7", "b-2"]),
        ("n[9-10]", ["n9", "n10"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("rack[1-2]n[0-1]", ["rack1n0", "rack1n1", "rack2n0", "rack2n1"]),
        ("b2,a1", ["b2", "a1"]),
        ("", []),
    ],
)
def test_examples(nodes: str, names: list[str]) -> None:
    assert list(hosts(nodes)) == names


@pytest.mark.parametrize(
    "nodes", ["a[1", "a]1[", "a[]", "a[2-1]", "a[x]", "a,", ",a", "a,,b", "a b", "a[1-2-3]", "a[\u00b2]"]
)
def test_what_is_no_list_is_refused_with_the_form(nodes: str) -> None:
    text = f"{nodes!r} is no list of hosts: write it as Slurm does, such as a[01-03,7],b-2"
    with pytest.raises(UserError, match=re.escape(text)):
        list(hosts(nodes))
