"""The architecture, held as data and checked against every import statement, late and relative ones included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hpctrain"

# Lowest first. A part may import the layers below its own and itself, never a part beside it.
LAYERS = (
    {"errors"},
    {"topology", "schedules", "arena", "kernels"},
    {"config", "comm"},
    {"data", "models", "optim", "metrics"},
    {"gradients", "scaling", "launch"},
    {"train"},
    {"bench", "doctor", "sweep"},
    {"cli"},
    {"__main__"},
)
# Outside the layers: what these may import, whole.
APART = {"build_horovod": {"errors"}}

# Who may see more of comm than these two modules.
COMM_FOR_ALL = {"hpctrain.comm.base", "hpctrain.comm.agree"}
COMM_FOR = {"comm", "train", "bench", "doctor"}

# Libraries with state of their own or a heavy import: the files that may import them, and only inside functions.
CONFINED = {
    "horovod": {"comm/horovod_engine.py"},
    "mpi4py": {"comm/mpi_engine.py"},
    "cupy": {"comm/cupy_nccl.py"},
    "nvidia.dali": {"data/dali.py"},
    "torch.distributed": {"comm/torch_engine.py"},
}
FORBIDDEN = {"torchvision", "tests", "benchmarks"}

WITHOUT_TORCH = ("errors", "topology", "schedules", "config", "launch", "scaling", "cli", "build_horovod")

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
# path: (lines allowed, reason)
LONGER_FILES: dict[str, tuple[int, str]] = {}
# path:function: (lines allowed, reason)
LONGER_FUNCTIONS: dict[str, tuple[int, str]] = {}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(("hpctrain", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
MODULES |= {name.removesuffix(".__init__") for name in MODULES}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether at the top of the module) of all that ``path`` imports.

    A string that is the name of a module of ours counts too: registries import what they name.
    """
    tree = ast.parse(path.read_text(), str(path))
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = ("hpctrain", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in late
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield f"{source}.{alias.name}", node.lineno, id(node) not in late
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = re.fullmatch(r"(hpctrain(?:\.\w+)+)(?::\w+)?", node.value)
            if match:
                yield match[1], node.lineno, False


def module_of(dotted: str) -> str:
    """The module of ours that ``dotted`` names or lies in; "hpctrain" for what the package itself defines."""
    parts = dotted.split(".")
    return next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES | {"hpctrain"})


def allowed_parts(part: str) -> set[str]:
    if part in APART:
        return {part} | APART[part]
    layer = next(number for number, parts in enumerate(LAYERS) if part in parts)
    return {part}.union(*LAYERS[:layer])


def under(dotted: str, library: str) -> bool:
    return dotted == library or dotted.startswith(library + ".")


def fail_if(complaints: list[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)


def test_every_file_has_a_layer() -> None:
    known = set().union(*LAYERS) | set(APART) | {"__init__"}
    assert {part_of(path) for path in FILES} <= known


def test_imports_point_one_way() -> None:
    complaints = []
    for path in FILES:
        if path == PACKAGE / "__init__.py":
            continue
        for dotted, line, _ in imports(path):
            if not under(dotted, "hpctrain") or module_of(dotted) == "hpctrain":
                continue
            target = module_of(dotted).split(".")[1]
            if target not in allowed_parts(part_of(path)):
                complaints.append(f"{name_of(path)}:{line} imports {dotted}: {part_of(path)} may not see {target}")
    fail_if(complaints)


def test_only_the_interface_of_comm_is_seen_from_above() -> None:
    complaints = [
        f"{name_of(path)}:{line} imports {dotted}"
        for path in FILES
        if part_of(path) not in COMM_FOR
        for dotted, line, _ in imports(path)
        if under(dotted, "hpctrain.comm") and module_of(dotted) not in COMM_FOR_ALL
    ]
    fail_if(complaints)


@pytest.mark.parametrize("library", CONFINED)
def test_confined_libraries_are_imported_late_and_in_their_file(library: str) -> None:
    complaints = []
    for path in FILES:
        for dotted, line, at_top in imports(path):
            if not under(dotted, library):
                continue
            if name_of(path) not in CONFINED[library]:
                complaints.append(f"{name_of(path)}:{line} imports {dotted}, which belongs in {CONFINED[library]}")
            elif at_top:
                complaints.append(f"{name_of(path)}:{line} imports {dotted} at the top of the module")
    fail_if(complaints)


def test_nothing_forbidden_is_imported() -> None:
    complaints = [
        f"{name_of(path)}:{line} imports {dotted}"
        for path in FILES
        for dotted, line, _ in imports(path)
        if any(under(dotted, library) for library in FORBIDDEN)
    ]
    fail_if(complaints)


def test_a_login_node_needs_no_torch() -> None:
    names = sorted(
        ".".join(("hpctrain", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in FILES
        if part_of(path) in WITHOUT_TORCH
    )
    code = (
        f"import sys, {', '.join(names)}; print(*sorted({{'torch', 'matplotlib', 'nvidia.dali'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_files_and_functions_fit_their_budgets() -> None:
    complaints = []
    for path in FILES:
        text = path.read_text()
        lines, (limit, _) = len(text.splitlines()), LONGER_FILES.get(name_of(path), (MAX_FILE_LINES, ""))
        if lines > limit:
            complaints.append(f"{name_of(path)} has {lines} lines, more than {limit}")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            limit, _ = LONGER_FUNCTIONS.get(f"{name_of(path)}:{node.name}", (MAX_FUNCTION_LINES, ""))
            if length > limit:
                complaints.append(f"{name_of(path)}:{node.lineno} {node.name} has {length} lines, more than {limit}")
    fail_if(complaints)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name_of(path)
        for path in FILES
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("import hpctrain.train.loop", "hpctrain.train.loop"),
        ("from hpctrain import train", "hpctrain.train"),
        ("def f():\n    from ..train import step", "hpctrain.train.step"),
        ("from . import ranks", "hpctrain.topology.ranks"),
        ("WHERE = 'hpctrain.train.loop:run'", "hpctrain.train.loop"),
    ],
)
def test_the_reader_of_imports_sees_every_form(
    statement: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "topology").mkdir()
    path = tmp_path / "topology" / "sample.py"
    path.write_text(statement)
    assert [dotted for dotted, _, _ in imports(path)] == [seen]
