"""The GPU's kernels without a GPU: their results in Triton's interpreter, and the code they are compiled to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.needs import needs

needs("triton")
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
CHECKS = re.findall(r"^def (check_\w+)", (ROOT / "tests/unit/interpreted_kernels.py").read_text(), re.MULTILINE)
ALIGNED = [["tt.divisibility", 16]]
#: program: (types of its arguments, its constants)
PROGRAMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "narrow": ({"table": "*i64", "wire": "*WIRE", "scale": "fp32"}, {}),
    "narrow_with_feedback": (
        {"table": "*i64", "residual": "*fp32", "wire": "*WIRE", "scale": "fp32", "inverse": "fp32"},
        {},
    ),
    "count": ({"table": "*i64", "wire": "*WIRE", "counts": "*i32", "smallest_normal": "fp32"}, {}),
    "widen": (
        {"table": "*i64", "out": "*fp32", "partial": "*fp64", "partials": "i32", "scale": "fp32"},
        {"KIND": "WIRE"},
    ),
    "sum_rows": (
        {"addresses": "*i64", "out": "*WIRE", "length": "i32", "rows": "i32"},
        {"AT_ONCE": 8, "KIND": "WIRE", "VECTORS": True},
    ),
    "finish_widen": ({"partial": "*fp64", "partials": "i32", "found": "*fp64"}, {}),
}
CASES = [*((name, "fp16") for name in PROGRAMS), ("narrow", "bf16")]
#: What narrowing two numbers at once is called.
CONVERSIONS = {"fp16": "cvt.rn.f16x2.f32", "bf16": "cvt.rn.bf16x2.f32"}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Failures by check, from one process: the interpreter is chosen for a process as a whole."""
    if metadata.version("triton").startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 does not run on this numpy")
    command = [sys.executable, "-m", "tests.unit.interpreted_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["checks"] == CHECKS
    return found["failures"]


@pytest.mark.parametrize("check", CHECKS)
def test_results_are_those_of_the_reference(check: str, interpreted: dict[str, str]) -> None:
    assert check not in interpreted, interpreted[check]


def compiled(name: str, wire: str, capability: int) -> Any:
    """The program for a GPU of that compute capability, when all pointers but those in tables are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hpctrain.kernels import fused
    from hpctrain.kernels.device import OPTIONS

    program, (types, constants) = getattr(fused, name), PROGRAMS[name]
    kinds = {"fp16": triton.language.float16, "bf16": triton.language.bfloat16, "fp32": triton.language.float32}
    places = {argument: (position,) for position, argument in enumerate(program.arg_names)}
    source = ASTSource(
        program,
        {key: value.replace("WIRE", wire) for key, value in types.items()} | dict.fromkeys(constants, "constexpr"),
        constexprs={places[key]: kinds[wire] if value == "WIRE" else value for key, value in constants.items()},
        attrs={places[key]: ALIGNED for key, value in types.items() if value.startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)


def dumped(option: str, cubin: bytes, folder: Path) -> str:
    import triton

    path = folder / "program.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "wire"), CASES)
def test_compiled_without_spills_and_with_vectors(
    name: str, wire: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program = compiled(name, wire, capability)
    usage = dumped("--dump-resource-usage", program.asm["cubin"], tmp_path)
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
    instructions = set(re.findall(r"\b(?:LDG|STG|LDL|STL)\S*", dumped("-sass", program.asm["cubin"], tmp_path)))
    assert not {word for word in instructions if word.startswith(("LDL", "STL"))}, "registers are spilled"
    if name == "finish_widen":
        return
    vectors = {word[:3] for word in instructions if word.endswith(".128")}
    assert vectors == ({"LDG"} if name == "count" else {"LDG", "STG"})
    # Where addresses do not allow vectors, and at the ends, elements go one by one: that way must not have vanished.
    assert re.search(r"ld\.global\S*\.b(16|32) ", program.asm["ptx"])
    assert name not in ("narrow", "sum_rows") or CONVERSIONS[wire] in program.asm["ptx"]
    assert_hints_are_true(program.asm["ttgir"])


def assert_hints_are_true(text: str) -> None:
    """That a value is a multiple of 16 is said only of one that has just been multiplied by 16.

    Said of any other it holds, for the compiler, in both branches of the test that is to find it out.
    """
    body = re.sub(r" loc\(.*?\)", "", text).partition("tt.func")[2].partition("\n")[2]
    hinted = [line for line in body.splitlines() if "tt.divisibility" in line]
    assert hinted
    for line in hinted:
        value = re.search(r"= tt\.int_to_ptr (%\S+) ", line)
        assert value, line
        assert re.search(rf"{value[1]} = arith\.muli %\S+, %c16_i64", body), line
