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
from hpctrain.launch.resources import Request, resources
from hpctrain.launch.site import RUN_DIR, RUNS, SITE, Site, load_site
from hpctrain.launch.slurm import SlurmRefusal, ask_slurm

HOME = "HPCTRAIN_HOME"
_SCRIPT = Path("slurm", "train.sbatch")
#: Set by an allocation for what runs in it, and taken by a job that is submitted there for its own.
_OUTER = re.compile(
    r"SLURM_(JOB|STEP|TASK|NODE|CPU|GPU|MEM|TRES|NTASKS|NNODES|NPROCS|PROCID|LOCALID|ARRAY|RESTART|DISTRIBUTION|HINT)"
)
#: The one form in which a word cannot be taken for another option's value, nor for the script.
_OPTION = re.compile(r"--(?P<name>[a-zA-Z][\w-]*)(=.*)?", re.ASCII | re.DOTALL)
#: Options of sbatch that the checks, the script or what is told of the job rely on.
_DECIDED = (
    *("nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "cpus-per-task", "cpus-per-gpu", "gres", "gpus"),
    *("gpus-per-node", "gpus-per-task", "time", "array", "signal", "requeue", "no-requeue", "job-name", "output"),
    *("export", "chdir", "parsable", "wait", "wrap", "test-only"),
)


@dataclass(frozen=True)
class Submission:
    """An `sbatch` line. In ``log`` and ``run_dir`` %j stands for the job's id, and %% for a percent sign, as Slurm has
    it; so do %A and %a for those of an array and of its task, the first of which is ``first_task``.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]
    script: Path
    runs: Path
    log: str
    run_dir: str
    first_task: str

    def text(self) -> str:
        """What a person would type, and the script it starts."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return f"{' '.join([*words, shlex.join(self.argv)])}\n\n# {self.script}\n{self.script.read_text()}"


def prepare(
    config_path: Path, overrides: Sequence[str], request: Request, site_path: Path | None, environ: Mapping[str, str]
) -> Submission:
    """The submission that was asked for. Raises UserError where config, site and request do not go together."""
    _refuse_outer_allocation(environ)
    site = _load_site(site_path, environ)
    overrides = [*overrides, *_engine(request.engine)]
    # As the job will read it: the script puts the site's engine before what is asked for here.
    config = load_config(config_path, [*_engine(site.engine), *overrides])
    script = _find_script(environ)
    runs = _runs(site)
    stem = config_path.stem
    log = _escaped(str(runs / re.sub(r"[^\w.+-]", "_", stem, flags=re.ASCII))) + f"-{_log_ids(request)}.log"
    options = {
        **resources(site, request, config),
        "job-name": request.job_name or stem,
        "output": log,
        "signal": _signal(config, request, site),
        "export": "ALL",
    }
    switches = ["--parsable", _requeue(config, request, site)]
    sets = [word for override in overrides for word in ("--set", override)]
    asked = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return Submission(
        argv=("sbatch", *switches, *asked, *_more(request.more), str(script), str(config_path), *sets),
        environment={SITE: str(site.path.absolute()), HOME: str(script.parent.parent)},
        script=script,
        runs=runs,
        log=log,
        run_dir=_escaped(environ[RUN_DIR]) if environ.get(RUN_DIR) else _escaped(str(runs / stem)) + "-%j",
        first_task=re.split("[-,%]", request.array or "")[0],
    )


@dataclass(frozen=True)
class SubmittedJob:
    """A job that Slurm has taken. Both paths are absolute, unless HPCTRAIN_RUN_DIR gave a relative one."""

    id: str
    run_dir: str
    log: str

    def text(self) -> str:
        """What the user wants to know next."""
        return (
            f"job            {self.id}\nrun directory  {self.run_dir}\nlog            {self.log}\n"
            f"follow         tail -F {shlex.quote(self.log)}\nstate          squeue --job {self.id}\n"
            f"end it         scancel {self.id}"
        )

    def lines(self) -> str:
        """What a script reads: the job's id, the run directory, the log; a line each, with nothing around them."""
        return f"{self.id}\n{self.run_dir}\n{self.log}"


def submit(submission: Submission, environ: Mapping[str, str]) -> SubmittedJob:
    """Submit it. Raises UserError where Slurm refuses."""
    try:
        submission.runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder of runs {submission.runs} cannot be made ({error.strerror}): set {RUNS} to one that can"
        ) from error
    try:
        told = ask_slurm(submission.argv, {**environ, **submission.environment})
    except SlurmRefusal as refusal:
        raise UserError(
            f"Slurm refuses the job ({refusal}): change the option, or the key of {submission.environment[SITE]}, "
            "that it names"
        ) from None
    # With several clusters it is id;cluster.
    job = told.strip().partition(";")[0]
    ids = {"%j": job, "%A": job, "%a": submission.first_task, "%%": "%"}
    run_dir, log = (
        re.sub("%[jAa%]", lambda found: ids[found[0]], path) for path in (submission.run_dir, submission.log)
    )
    return SubmittedJob(job, run_dir, log)


def _refuse_outer_allocation(environ: Mapping[str, str]) -> None:
    if left_over := sorted(name for name in environ if _OUTER.match(name)):
        raise UserError(
            f"this shell has the variables of another allocation ({left_over[0]}={environ[left_over[0]]}), which the "
            f"job would take for its own: submit from a login shell, or `unset {' '.join(left_over)}` first"
        )


def _load_site(path: Path | None, environ: Mapping[str, str]) -> Site:
    if path is None and not environ.get(SITE):
        raise UserError(
            f"no site file: name one with --site or {SITE} (slurm/sites has examples, template.env explains the keys)"
        )
    return load_site(path or Path(environ[SITE]), environ)


def _engine(name: str | None) -> Sequence[str]:
    """What sets the engine to ``name``, if one is named."""
    return [] if name is None else [f"comm.engine={name}"]


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


def _runs(site: Site) -> Path:
    runs = site.runs or "runs"
    if "\\" in runs or "$" in runs:
        raise UserError(f"{RUNS} is {runs!r}: give it without backslashes, and with variables that this shell has")
    return Path(os.path.abspath(runs))


def _escaped(path: str) -> str:
    """``path`` as a part of Slurm's pattern that stands for itself."""
    return path.replace("%", "%%")


def _log_ids(request: Request) -> str:
    return "%A_%a" if request.array else "%j"


def _requeue(config: Config, request: Request, site: Site) -> str:
    if site.requeue == "yes":
        return "--requeue"
    if request.array is None and config.launch.max_requeues > 0:
        raise UserError(
            f"{site.path} forbids requeueing (HPCTRAIN_REQUEUE=no), so a job that is preempted would not go on: have "
            "tasks take turns with --array 0-9%1, or do without with --set launch.max_requeues=0"
        )
    return "--no-requeue"


def _signal(config: Config, request: Request, site: Site) -> str:
    """The warning ``launch.margin_s`` before the time limit, for ranks that cannot tell when their time is up."""
    lead_s = math.ceil(config.launch.margin_s)
    limit = request.time_limit or site.max_time
    if limit is not None and seconds_of(limit, "--time") <= lead_s:
        raise UserError(
            f"a job of {limit} would be over before it trains, since its last {lead_s} s are kept for the checkpoint "
            "(launch.margin_s): give it more --time"
        )
    # Without an option the script's own #SBATCH line would hold; SIGURG is ignored by whoever does not ask for it.
    return f"B:{config.launch.signals[0] if config.launch.signals else 'URG'}@{lead_s}"


def _more(words: Sequence[str]) -> Sequence[str]:
    """``words``, options for sbatch as the user gave them. Raises UserError for one that would undo submit's own."""
    for word in words:
        option = _OPTION.fullmatch(word)
        if option is None:
            raise UserError(
                f"{word!r} is no option for sbatch: write one as --NAME or --NAME=VALUE behind --, and a change to the "
                "configuration as --set KEY=VALUE"
            )
        # sbatch takes the beginning of a name for the name.
        if any(decided.startswith(option["name"]) for decided in _DECIDED):
            raise UserError(
                f"{word!r} behind -- would undo what submit decides: use its own options (hpctrain submit --help), the "
                "site file or the configuration"
            )
    return words
