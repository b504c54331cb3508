"""Site files: read as a shell reads them, nothing executed, errors with file, line and remedy."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.launch.envfile import read_env
from hpctrain.launch.site import Site, key_of, load_site

SITES = Path(__file__).resolve().parents[2] / "slurm/sites"
FULL = {
    "PARTITION": ("gpu", "gpu"),
    "ACCOUNT": ("'proj 7'", "proj 7"),
    "QOS": ("high", "high"),
    "GPUS_PER_NODE": ("8", 8),
    "CPUS_PER_NODE": ("112", 112),
    "MEMORY_PER_NODE": ("480G", "480G"),
    "MAX_NODES": ("64", 64),
    "MAX_TIME": ("2-00:00:00", "2-00:00:00"),
    "GRES": ("gpus", "gpus"),
    "MPI": ("pmix_v4", "pmix_v4"),
    "ENGINE": ("horovod", "horovod"),
    "MODULES": ('"gcc cuda/12"', "gcc cuda/12"),
    "VENV": ("$HOME/venv", "/home/me/venv"),
    "CONTAINER": ("/images/x.sif", "/images/x.sif"),
    "SCRATCH": ('"${TMPDIR}/x"', "${TMPDIR}/x"),
    "RUNS": ("$HPCTRAIN_VENV/../runs", "/home/me/venv/../runs"),
    "REQUEUE": ("no", "no"),
}


def site_file(folder: Path, text: str) -> Path:
    path = folder / "my.env"
    path.write_text(text)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_site(path, {})
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_key_arrives(tmp_path: Path) -> None:
    lines = [f"HPCTRAIN_{name}={text}" for name, (text, _) in FULL.items()]
    site = load_site(site_file(tmp_path, "\n".join(["# a site", "", *lines, "NCCL_DEBUG=WARN"])), {"HOME": "/home/me"})
    assert {name: getattr(site, name.lower()) for name in FULL} == {name: value for name, (_, value) in FULL.items()}
    assert {key_of(name) for name in Site.model_fields if name != "path"} == {f"HPCTRAIN_{name}" for name in FULL}


def test_a_key_without_a_value_is_not_given(tmp_path: Path) -> None:
    site = load_site(site_file(tmp_path, "HPCTRAIN_PARTITION=\nHPCTRAIN_GPUS_PER_NODE=\n"), {})
    assert (site.partition, site.gpus_per_node, site.mpi) == (None, None, "pmix")


def test_what_is_exported_comes_before_the_file(tmp_path: Path) -> None:
    path = site_file(tmp_path, "HPCTRAIN_RUNS=theirs\nHPCTRAIN_SCRATCH=/raid\nHPCTRAIN_MAX_NODES=4\n")
    site = load_site(path, {"HPCTRAIN_RUNS": "mine", "HPCTRAIN_SCRATCH": "", "HPCTRAIN_ENGINE": "mpi"})
    assert (site.runs, site.scratch, site.max_nodes, site.engine) == ("mine", "/raid", 4, "mpi")
    with pytest.raises(UserError, match="^this shell: HPCTRAIN_MAX_NODES is 'x', but must be a whole number$"):
        load_site(path, {"HPCTRAIN_MAX_NODES": "x"})


@pytest.mark.parametrize("name", ["dgx", "p100-infiniband", "cpu", "template"])
def test_the_shipped_sites_are_sites(name: str) -> None:
    site = load_site(SITES / f"{name}.env", {"HOME": "/home/me", "USER": "me"})
    assert site.gres is not None
    if name != "template":
        assert site.cpus_per_node and (site.gpus_per_node or site.gres == "none")


def test_the_template_has_every_key_and_a_comment_before_each() -> None:
    lines = (SITES / "template.env").read_text().splitlines()
    keys = [line.partition("=")[0] for line in lines if line.startswith("HPCTRAIN_")]
    assert sorted(keys) == sorted(key_of(name) for name in Site.model_fields if name != "path")
    for before, line in pairwise(lines):
        assert not line.startswith("HPCTRAIN_") or before.startswith("# ")


PIECES = [
    "a",
    "1",
    " ",
    "$A",
    "${A}",
    "'",
    '"',
    "\\",
    "#",
    " #",
    "=",
    "~",
    "*",
    ";",
    "`",
    "(",
    "$(",
    ",",
    "é",
    "x y",
    "\t",
    "\r",
    "\f",
]
QUOTED = st.sampled_from(["{}", "'{}'", '"{}"', "{} # {}"])


@st.composite
def written(draw: st.DrawFn) -> str:
    text = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=5)))
    return draw(QUOTED).replace("{}", text)


@given(st.lists(written(), min_size=10, max_size=30))
@settings(max_examples=50)
def test_a_line_is_refused_or_means_what_a_shell_makes_of_it(values: list[str]) -> None:
    environ = {"A": "v w"}
    understood: dict[str, tuple[str, str]] = {}
    with TemporaryDirectory() as folder:
        for number, value in enumerate(values):
            try:
                entry = read_env(site_file(Path(folder), f"K{number}={value}"), environ)[f"K{number}"]
            except UserError:
                continue
            # A name that is not known yet is left to the job's shell.
            if "$" not in entry.value:
                understood[f"K{number}"] = value, entry.value
    script = "".join(f"{key}={text}\nprintf '%s\\0' \"${key}\"\n" for key, (text, _) in understood.items())
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=30, check=True, env=environ)
    assert done.stderr == b""
    assert done.stdout.decode().split("\0")[:-1] == [value for _, value in understood.values()]


@pytest.mark.parametrize(
    "line",
    [
        "A=$(touch x)",
        "A=`id`",
        'A="$(id)"',
        "A=a b",
        "A=a;b",
        "A='x",
        "A=a\\ b",
        "just words",
        "A =b",
        "1A=b",
        "A=a#b",
        "A=~/x",
        "A=*",
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = site_file(tmp_path, f"# first\n{line}\n")
    text = f"{path}:2: {line!r} is not KEY=VALUE: put a value with blanks between quotes, and leave commands"
    assert complaint(path).startswith(text)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("HPCTRAIN_GRES=gpu", "HPCTRAIN_GRES is 'gpu', but must be 'gres', 'gpus' or 'none'"),
        ("HPCTRAIN_MPI=pmi2", "HPCTRAIN_MPI is 'pmi2', but must be pmix, pmix_v4 or the like, or none"),
        ("HPCTRAIN_CPUS_PER_NODE=many", "HPCTRAIN_CPUS_PER_NODE is 'many', but must be a whole number"),
        ("HPCTRAIN_CPUS_PER_NODE=0", "HPCTRAIN_CPUS_PER_NODE is '0', but must be greater than or equal to 1"),
        ("HPCTRAIN_MEMORY_PER_NODE=lots", "HPCTRAIN_MEMORY_PER_NODE is 'lots', but must be a size as Slurm writes it"),
        ("HPCTRAIN_MAX_TIME=1h", "HPCTRAIN_MAX_TIME is '1h', but must be a time as Slurm writes it"),
        ("HPCTRAIN_REQUEUE=maybe", "HPCTRAIN_REQUEUE is 'maybe', but must be 'yes' or 'no'"),
        ("HPCTRAIN_ENGINE=nccl", "HPCTRAIN_ENGINE is 'nccl', but must be 'auto', 'horovod', 'mpi' or 'torch'"),
        ("HPCTRAIN_PARTITON=x", "HPCTRAIN_PARTITON is an unknown key: did you mean HPCTRAIN_PARTITION?"),
        ("HPCTRAIN_XYZZY=x", "HPCTRAIN_XYZZY is an unknown key: slurm/sites/template.env lists those there are"),
        ("\nA=1\nA=2", "A is already set on line 3: leave one of them out"),
    ],
)
def test_a_wrong_value_is_told_with_file_line_and_what_is_right(tmp_path: Path, line: str, text: str) -> None:
    path = site_file(tmp_path, f"\n{line}\n")
    assert re.sub(r"^.*?:\d+: ", "", complaint(path)).startswith(text)
    assert complaint(path).startswith(f"{path}:{2 + line.count(chr(10))}: ")


def test_a_missing_key_names_itself_and_the_file(tmp_path: Path) -> None:
    site = load_site(site_file(tmp_path, ""), {})
    with pytest.raises(UserError, match=r"my\.env lacks HPCTRAIN_GRES, which this submission needs: add it"):
        site.need("gres")


def test_lines_as_windows_ends_them_are_refused(tmp_path: Path) -> None:
    """A shell keeps the carriage return: srun would be asked for the MPI of the name `pmix\\r`."""
    path = tmp_path / "my.env"
    path.write_bytes(b"# a site\r\nHPCTRAIN_MPI=pmix\r\n")
    assert complaint(path) == (
        f"{path}:2: the line ends as on Windows, and a shell would take the carriage return for a part of the value: "
        "give the file Unix line ends (dos2unix)"
    )


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no site file" in complaint(tmp_path / "none.env")
    assert "cannot be read (Is a directory): give a readable one with --site" in complaint(tmp_path)
    (tmp_path / "bin.env").write_bytes(b"\xff\xfe")
    assert "cannot be read (it is not UTF-8 text)" in complaint(tmp_path / "bin.env")
