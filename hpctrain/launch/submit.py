"""The command `submit`: from a config and a size to one `sbatch` line that a person could have typed.

It checks what can be known on a login node, without torch, and refuses what the site cannot give. What the job then
does is told by ``slurm/train.sbatch`` alone.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.launch.durations import seconds_of
from hpctrain.launch.site import RUN_DIR, RUNS, SITE, Site, load_site
from hpctrain.launch.slurm import SlurmRefusal, ask_slurm

HOME = "HPCTRAIN_HOME"
_SCRIPT = Path("slurm", "train.sbatch")
#: Set by an allocation for what runs in it, and taken by a job that is submitted there for its own.
_OUTER = re.compile(
    r"SLURM_(JOB|STEP|TASK|NODE|CPU|GPU|MEM|TRES|NTASKS|NNODES|NPROCS|PROCID|LOCALID|ARRAY|RESTART|DISTRIBUTION|HINT)"
)


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None where it was silent."""

    nodes: int
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    engine: str | None = None
    array: str | None = None
    time: str | None = None
    job_name: str | None = None


@dataclass(frozen=True)
class Submission:
    """An `sbatch` line. ``log`` and ``run_dir`` have ``{job}`` where the job's id belongs."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    script: Path
    runs: Path
    log: str
    run_dir: str

    def send(self, environ: Mapping[str, str]) -> str:
        """Submit it; the job's id. Raises UserError where Slurm refuses."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder of runs {self.runs} cannot be made ({error.strerror}): set {RUNS} to one that can"
            ) from error
        try:
            told = ask_slurm(self.argv, {**environ, **self.environment})
        except SlurmRefusal as refusal:
            raise UserError(
                f"Slurm refuses the job ({refusal}): change the option, or the key of {self.environment[SITE]}, "
                "that it names"
            ) from None
        # With several clusters it is id;cluster.
        return told.strip().partition(";")[0]

    def text(self) -> str:
        """What a person would type, and the script it starts."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return f"{' '.join([*words, shlex.join(self.argv)])}\n\n# {self.script}\n{self.script.read_text()}"


def prepare(
    config_path: Path, overrides: Sequence[str], request: Request, site_path: Path | None, environ: Mapping[str, str]
) -> Submission:
    """The submission that was asked for. Raises UserError where config, site and request do not go together."""
    _refuse_outer_allocation(environ)
    engine = [] if request.engine is None else [f"comm.engine={request.engine}"]
    overrides = [*overrides, *engine]
    config = load_config(config_path, overrides)
    if site_path is None and not environ.get(SITE):
        raise UserError(
            f"no site file: name one with --site or {SITE} (slurm/sites has examples, template.env explains the keys)"
        )
    site = load_site(site_path or Path(environ[SITE]), environ)
    script = _find_script(environ)
    runs = _runs(site, environ)
    stem = config_path.stem
    safe_stem = re.sub(r"[^\w.+-]", "_", stem, flags=re.ASCII)
    # Of an array's logs the first task's is told.
    ids = ("%A_%a", f"{{job}}_{re.split('[-,%]', request.array)[0]}") if request.array else ("%j", "{job}")
    log = str(runs / f"{safe_stem}-").replace("%", "%%")
    options = {
        **_resources(site, request, config),
        "job-name": request.job_name or stem,
        "output": f"{log}{ids[0]}.log",
        "signal": _signal(config, request, site),
        "export": "ALL",
    }
    switches = ["--parsable", "--requeue" if site.requeue == "yes" else "--no-requeue"]
    sets = [word for override in overrides for word in ("--set", override)]
    asked = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return Submission(
        ("sbatch", *switches, *asked, str(script), str(config_path), *sets),
        {SITE: str(site.path.absolute()), HOME: str(script.parent.parent)},
        script,
        runs,
        _braces(str(runs / f"{safe_stem}-")) + f"{ids[1]}.log",
        _braces(environ[RUN_DIR]) if environ.get(RUN_DIR) else _braces(str(runs / f"{stem}-")) + "{job}",
    )


def submit(submission: Submission, environ: Mapping[str, str]) -> str:
    """Send it, and what the user wants to know next, as text."""
    job = submission.send(environ)
    log, run_dir = (text.format(job=job) for text in (submission.log, submission.run_dir))
    return (
        f"job            {job}\nrun directory  {run_dir}\nlog            {log}\n"
        f"follow         tail -F {shlex.quote(log)}\nstate          squeue --job {job}\nend it         scancel {job}"
    )


def _refuse_outer_allocation(environ: Mapping[str, str]) -> None:
    if left_over := sorted(name for name in environ if _OUTER.match(name)):
        raise UserError(
            f"this shell has the variables of another allocation ({left_over[0]}={environ[left_over[0]]}), which the "
            "job would take for its own: submit from a login shell, or `unset ${!SLURM_@}` first"
        )


def _find_script(environ: Mapping[str, str]) -> Path:
    """train.sbatch where the user stands, or beside this package."""
    checkout = Path(__file__).resolve().parents[2]
    places = [Path(environ[HOME])] if environ.get(HOME) else [Path.cwd(), checkout]
    for place in places:
        if (place / _SCRIPT).is_file():
            return place / _SCRIPT
    raise UserError(
        f"there is no {_SCRIPT} in {' or '.join(map(str, places))}: go to hpctrain's checkout, or name it with {HOME}"
    )


def _runs(site: Site, environ: Mapping[str, str]) -> Path:
    runs = site.runs or environ.get(RUNS) or "runs"
    if "\\" in runs or "$" in runs:
        raise UserError(f"{RUNS} is {runs!r}: give it without backslashes, and with variables that this shell has")
    return Path(os.path.abspath(runs))


def _resources(site: Site, request: Request, config: Config) -> dict[str, str | int | None]:
    """sbatch's options for nodes, ranks, cores, GPUs, memory and time, checked against what the site gives."""
    gpus, tasks = _gpus_and_tasks(site, request, config)
    _check_size(site, request, tasks, config)
    cores = site.need("cores_per_node")
    if tasks > cores:
        raise UserError(f"{tasks} ranks a node are more than its {cores} cores ({site.path}): ask for fewer")
    # With a part of a node's GPUs goes as large a part of the rest: others may use it, and rates stay comparable.
    whole = site.gpus_per_node if gpus and site.gpus_per_node else tasks
    return {
        "nodes": request.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": max(1, cores // whole),
        "gres": f"gpu:{gpus}" if gpus and site.gres == "gres" else None,
        "gpus-per-node": gpus if gpus and site.gres == "gpus" else None,
        "mem": _share(site.memory_per_node, tasks, whole) if site.memory_per_node else None,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": request.time or site.max_time,
        "array": request.array,
    }


def _share(memory: str, part: int, whole: int) -> str:
    """``part`` of ``whole`` of a size that Slurm reads, whose plain numbers are MiB."""
    if part == whole:
        return memory
    size, unit = re.fullmatch(r"(\d+)([KMGT]?)", memory, re.ASCII).groups()  # type: ignore[union-attr]  # as Site checks
    return f"{int(size) * 1024 ** ' KMGT'.index(unit or 'M') * part // whole // 1024}K"


def _gpus_and_tasks(site: Site, request: Request, config: Config) -> tuple[int, int]:
    """GPUs and ranks of a node: one rank a GPU, or without GPUs as many ranks as asked for."""
    if site.need("gres") == "none":
        if request.gpus_per_node or config.train.device == "cuda":
            asked = "train.device=cuda" if not request.gpus_per_node else f"--gpus-per-node {request.gpus_per_node}"
            raise UserError(f"{site.path} is a site without GPUs, but {asked}: leave it out, or choose another --site")
        if request.tasks_per_node is None:
            raise UserError(f"{site.path} is a site without GPUs: say how many ranks a node has with --tasks-per-node")
        return 0, request.tasks_per_node
    there = site.need("gpus_per_node")
    gpus = there if request.gpus_per_node is None else request.gpus_per_node
    if not 1 <= gpus <= there:
        raise UserError(
            f"--gpus-per-node is {gpus}, but a node of {site.path} has {there}: ask for 1 to {there}, and for more "
            "with --nodes"
        )
    if request.tasks_per_node not in (None, gpus):
        raise UserError(
            f"--tasks-per-node is {request.tasks_per_node}, but each rank has a GPU of its own, and a node {gpus}: "
            "leave --tasks-per-node out"
        )
    return gpus, gpus


def _check_size(site: Site, request: Request, tasks: int, config: Config) -> None:
    if site.max_nodes is not None and request.nodes > site.max_nodes:
        raise UserError(
            f"--nodes is {request.nodes}, but {site.path} gives a job at most {site.max_nodes} (HPCTRAIN_MAX_NODES): "
            "ask for fewer"
        )
    if config.comm.engine == "serial" and request.nodes * tasks > 1:
        raise UserError(
            f"the serial engine is one process, but {request.nodes} x {tasks} ranks were asked for: set --engine to "
            "horovod, mpi or torch"
        )
    if request.array is not None and not re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*%1", request.array):
        raise UserError(
            f"--array is {request.array!r}, but its tasks take turns in one run directory: write it as 0-9%1, with %1 "
            "for one at a time"
        )
    limit = seconds_of(site.max_time, "HPCTRAIN_MAX_TIME") if site.max_time else math.inf
    if request.time is not None and seconds_of(request.time, "--time") > limit:
        raise UserError(
            f"--time is {request.time}, but {site.path} gives a job at most {site.max_time} (HPCTRAIN_MAX_TIME): "
            "ask for less; a longer training goes on in the next job"
        )


def _signal(config: Config, request: Request, site: Site) -> str | None:
    """The warning ``launch.margin_s`` before the time limit, for ranks that cannot tell when their time is up."""
    lead_s = math.ceil(config.launch.margin_s)
    limit = request.time or site.max_time
    if limit is not None and seconds_of(limit, "--time") <= lead_s:
        raise UserError(
            f"a job of {limit} would be over before it trains, since its last {lead_s} s are kept for the checkpoint "
            "(launch.margin_s): give it more --time"
        )
    return f"B:{config.launch.signals[0]}@{lead_s}" if config.launch.signals else None


def _braces(text: str) -> str:
    """``text`` so that str.format leaves it as it is."""
    return text.replace("{", "{{").replace("}", "}}")
