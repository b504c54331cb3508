"""What works on this machine, what does not and why, and what ``auto`` would pick: ``hpctrain doctor``.

Each engine and loader is asked in a child process, so that a library that crashes while it is loaded is an answer
like any other; one more child loads them all together, as a run does, and looks which shared libraries that maps.
No job is joined and no rank is started: whether ranks reach each other is for a run to show.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from hpctrain import __version__
from hpctrain.comm import registry
from hpctrain.data import loaders as loader_registry
from hpctrain.errors import UserError
from hpctrain.topology.gpus import read_gpus
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology

LAUNCHERS = ("horovodrun", "mpirun", "torchrun", "srun")
#: libraries of which one process must hold one copy at most
SINGLE = ("nccl", "cudart", "mpi")
CHILD_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``auto`` picks in one situation; ``picked`` is empty where it finds nothing."""

    situation: str
    picked: str
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found. ``problems`` are sentences with their remedies; without any, ``auto`` works."""

    machine: dict[str, str]
    gpus: tuple[str, ...]
    launchers: dict[str, str]
    engines: tuple[Probe, ...]
    loaders: tuple[Probe, ...]
    mapped: dict[str, list[str]]
    auto: tuple[Choice, ...]
    problems: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 when ``auto`` would work."""
        return 1 if self.problems else 0


def examine() -> Report:
    """Ask every engine and loader, then all of them together. Takes some seconds a library."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        engines = tuple(pool.map(lambda name: ask(f"engine:{name}", name), registry.ENGINES))
        loaders = tuple(pool.map(lambda name: ask(f"loader:{name}", name), loader_registry.LOADERS))
    launchers = {name: path for name in LAUNCHERS if (path := shutil.which(name))}
    sound = [f"engine:{answer.name}" for answer in engines if answer.ok]
    sound += [f"loader:{answer.name}" for answer in loaders if answer.ok]
    installed = [distribution.name.lower() for distribution in importlib.metadata.distributions()]
    together, failure = _child("together", *sound)
    together = together or {"mapped": {}, "auto": [], "gpus": []}
    auto = tuple(Choice(**choice) for choice in together["auto"])
    problems = [f"loading all sound libraries in one process fails: {failure}"] if failure else []
    gpus, gpu_problems = _gpus(installed)
    problems += gpu_problems + distribution_problems(installed) + mapping_problems(together["mapped"])
    problems += auto_problems(auto, engines, on_gpu=bool(together["gpus"]))
    if gpus and not together["gpus"]:
        problems.append("there are GPUs that torch cannot use: install a CUDA build of torch that fits their driver")
    return Report(
        machine=_machine(), gpus=gpus or tuple(together["gpus"]), launchers=launchers, engines=engines, loaders=loaders,
        mapped=together["mapped"], auto=auto, problems=tuple(problems),
    )  # fmt: skip


def ask(what: str, name: str) -> Probe:
    """The probe of one engine ("engine:horovod") or loader ("loader:dali"), taken in a child process."""
    record, failure = _child("probe", what)
    if record is None:
        return Probe(name, ok=False, reason=failure, remedy=f"reinstall {name}, for the torch that is installed here")
    return TypeAdapter(Probe).validate_python(record)


def _child(*arguments: str) -> tuple[Any, str]:
    """What ``answer`` returns in a process of its own; else None and why there is no answer."""
    answer = "import sys, hpctrain.doctor.machine as d; d.print_answer(sys.argv[1:])"
    command = [sys.executable, "-c", answer, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {CHILD_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    if done.returncode < 0:
        return None, f"the process that loaded it was ended by {signal.Signals(-done.returncode).name}"
    return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def print_answer(arguments: Sequence[str]) -> None:
    """The child's side of ``_child``: the answer in JSON, as the last line of standard output."""
    answers: dict[str, Callable[..., Any]] = {"probe": _probe, "together": _together}
    answer = answers[arguments[0]](*arguments[1:])
    print("\n" + json.dumps(answer), flush=True)
    # Libraries of a broken build crash while they are unloaded; the answer is given by then.
    os._exit(0)


def _probe(what: str) -> dict[str, Any]:
    kind, _, name = what.partition(":")
    return asdict(registry.probe(name) if kind == "engine" else loader_registry.probe(name))


def _together(*sound: str) -> dict[str, Any]:
    import torch

    for what in sound:
        _probe(what)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    situations = [Topology(), *(Topology(world_size=2, launcher=name) for name in LAUNCHERS if shutil.which(name))]
    choices = [_choose(topology, device) for topology in situations]
    choices.append(Choice("data.loader", *loader_registry.choose("auto")))
    with open("/proc/self/maps") as maps:
        mapped = mapped_libraries(maps.read())
    auto = [asdict(choice) for choice in choices]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"mapped": mapped, "auto": auto, "gpus": gpus}


def _choose(topology: Topology, device: Any) -> Choice:
    situation = "plain python" if topology.launcher == "none" else topology.launcher
    try:
        return Choice(situation, *registry.choose("auto", topology, device))
    except UserError as error:
        return Choice(situation, "", str(error))


def mapped_libraries(maps: str) -> dict[str, list[str]]:
    """The files of each library of ``SINGLE`` in the text of a /proc/PID/maps."""
    found = re.findall(rf"\s(/\S*/lib({'|'.join(SINGLE)})(?:-[0-9a-f]+)?\.so\S*)$", maps, re.MULTILINE)
    return {kind: sorted({path for path, of in found if of == kind}) for kind in SINGLE}


def mapping_problems(mapped: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each library that one process holds twice."""
    return [
        f"a run would load {len(paths)} copies of lib{kind} ({', '.join(paths)}): "
        "uninstall one, or build Horovod again with `make horovod`"
        for kind, paths in mapped.items()
        if len(paths) > 1
    ]


def distribution_problems(names: Sequence[str]) -> list[str]:
    """A sentence for each set of installed distributions that get in each other's way."""
    problems = []
    for pattern, what in (
        (r"nvidia-nccl-cu\d+", "NCCL"),
        (r"nvidia-dali-cuda\d+", "DALI"),
        (r"cupy(-(cuda|rocm).*)?", "CuPy"),
    ):
        found = sorted({name for name in names if re.fullmatch(pattern, name)})
        if len(found) > 1:
            problems.append(f"{what} is installed {len(found)} times ({', '.join(found)}): uninstall all but one")
    if "nvidia-dali" in names:
        problems.append("nvidia-dali is a placeholder: uninstall it and install nvidia-dali-cuda130")
    return problems


def auto_problems(auto: Sequence[Choice], engines: Sequence[Probe], *, on_gpu: bool) -> list[str]:
    """A sentence for each situation in which ``auto`` finds nothing, or leaves NCCL out on a machine with GPUs."""
    answers = {engine.name: engine for engine in engines}
    problems = []
    for choice in auto:
        engine = answers.get(choice.picked)
        if not choice.picked:
            problems.append(choice.why)
        elif on_gpu and engine and engine.name != "serial" and "NCCL" not in engine.built_with:
            problems.append(
                f"under {choice.situation}, auto takes {engine.name} without NCCL ({choice.why}): "
                "build Horovod with `make horovod GPU=1`"
            )
    return problems


def _machine() -> dict[str, str]:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count()
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "hpctrain": __version__,
        "cores": f"{usable} usable of {total}",
    }


def _gpus(installed: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """One line a GPU by NVML, and what is wrong with the driver. Nothing where there is no NVML or no driver."""
    try:
        gpus = read_gpus()
    except LookupError:
        return (), []
    driver = f"driver {gpus.driver}, CUDA up to {gpus.cuda[0]}.{gpus.cuda[1]}"
    lines = tuple(
        f"{name}, {memory_bytes / 2**30:.0f} GiB, {driver}"
        for name, memory_bytes in zip(gpus.names, gpus.memory_bytes, strict=True)
    )
    return lines, dali_problems(gpus.cuda[0], installed) if lines else []


def dali_problems(driver_cuda: int, names: Sequence[str]) -> list[str]:
    """A sentence when the DALI installed is for a newer CUDA than the driver's, whose major version is given."""
    wheels = [match for name in names if (match := re.fullmatch(r"nvidia-dali-cuda(\d+)0", name))]
    return [
        f"{wheel[0]} needs a newer driver than this one (CUDA {driver_cuda}): install nvidia-dali-cuda{driver_cuda}0"
        for wheel in wheels
        if int(wheel[1]) > driver_cuda
    ]


def to_record(report: Report) -> dict[str, Any]:
    """The report as JSON values, with ``ok`` first."""
    return {"ok": report.exit_code == 0, **asdict(report)}


def render(report: Report) -> None:
    """Print the report as tables, the problems last."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None)
    for name, value in (report.machine | report.launchers).items():
        facts.add_row(name, value)
    for number, gpu in enumerate(report.gpus):
        facts.add_row(f"GPU {number}", gpu)
    for kind, paths in report.mapped.items():
        facts.add_row(f"lib{kind}", ", ".join(paths) or "none is loaded")
    console.print(facts)
    for title, answers in (("engine", report.engines), ("loader", report.loaders)):
        table = Table(title, "works", "versions", "built with", "remarks")
        for answer in answers:
            versions = ", ".join(f"{name} {version}" for name, version in answer.versions.items())
            remarks = ": ".join(part for part in (answer.reason, answer.remedy) if part)
            table.add_row(answer.name, "yes" if answer.ok else "no", versions, ", ".join(answer.built_with), remarks)
        console.print(table)
    table = Table("auto under", "takes", "because")
    for choice in report.auto:
        table.add_row(choice.situation, choice.picked or "nothing", choice.why)
    console.print(table)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    console.print("auto works here" if report.exit_code == 0 else "auto does not work here as it should")
