"""Whether runs differ in size alone, so that their rates may be divided by each other.

What decides the work of a step or the machine that does it must agree, or the quotient is no speed-up: such
differences are refused. Software that is updated between two jobs rarely moves a rate by more than its spread,
and a series measured over weeks would otherwise be lost: such differences are told beside the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hpctrain.config.load import NOT_HASHED
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.scaling.runs import Run
from hpctrain.topology.voice import listed

#: Keys that set how large a run is; each series holds constant what its kind of scaling wants constant.
SIZE_KEYS = ("train.batch_per_worker", "train.accumulation", "parallel.virtual_workers", "gradients.grid")

#: The serial engine moves nothing: one worker alone is the same on every engine.
_ENGINE_OF_ONE = "serial"
_STEERING = ("NCCL_", "UCX_", "OMP_")
#: Share of the machine's time given to others from which a rate is no longer its own.
_STEAL_NOTED = 0.01
#: Steps whose median no single hiccup moves by much.
_ENOUGH_STEPS = 20
_UNSET = "unset"

Facts = dict[str, Any]


def refuse_differences(runs: Sequence[Run]) -> None:
    """Return when all ``runs`` differ from the first in size alone.

    Raises UserError naming two runs and the keys in which they differ otherwise.
    """
    first = runs[0]
    engines = [run for run in runs if not _is_alone(run)]
    for reference, others, facts in (
        (first, runs, lambda run: _settings(run.config)),
        (first, runs, _what_was_done),
        (engines[0] if engines else first, engines, lambda run: {"engine.name": run.record.engine.name}),
    ):
        for run in others:
            _refuse(reference, run, facts)


def remarks(runs: Sequence[Run]) -> list[str]:
    """Sentences on what may colour the figures: software that differs, machines that were shared, few steps."""
    # One worker sends nothing, whatever its reduction is called.
    several = [run for run in runs if run.size.workers > 1]
    differences = [
        f"{key} differs between runs: {_variants(values)}"
        for key, values in (*_collect(runs, _software), *_collect(several, _reduction))
        if len({str(value) for _, value in values}) > 1
    ]
    return differences + [remark for run in runs for remark in _about(run)]


def _about(run: Run) -> Iterator[str]:
    """What may colour the rate of one run."""
    steal, steps = run.record.provenance.get("steal_share"), run.steps_measured
    counted = "1 step" if steps == 1 else f"{steps} steps"
    if isinstance(steal, float) and steal > _STEAL_NOTED:
        yield f"{run.path}: the hypervisor gave {steal:.1%} of the machine's time to others"
    if run.restarts:
        yield f"{run.path} has had {run.restarts + 1} launches: its rate is that of the last" + (
            f", from {counted}" if steps is not None else ""
        )
    elif steps is not None and steps < _ENOUGH_STEPS:
        yield f"{run.path}: its rate is that of {counted} alone"


def _refuse(first: Run, run: Run, facts: Callable[[Run], Facts]) -> None:
    ours, theirs = facts(first), facts(run)
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key, _UNSET) != theirs.get(key, _UNSET)]
    if different:
        keys = ", ".join(f"{key} ({theirs.get(key, _UNSET)}, not {ours.get(key, _UNSET)})" for key in different)
        raise UserError(
            f"{run.path} differs from {first.path} in more than size: {keys}: leave one out, or report them apart"
        )


def _is_alone(run: Run) -> bool:
    return run.size.workers == 1 and run.record.engine.name == _ENGINE_OF_ONE


def _settings(config: Config) -> Facts:
    """Dotted key to value, of all keys that decide what a run computes and not how large it is."""
    return {
        key: value
        for key, value in _flat(config.model_dump(mode="json"))
        if not any(key == left or key.startswith(f"{left}.") for left in (*NOT_HASHED, *SIZE_KEYS))
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _what_was_done(run: Run) -> Facts:
    """What the configuration leaves to the machine, and the machine itself."""
    data, provenance = run.record.data, run.record.provenance
    facts = {"data.loader": data.loader, "data.real": data.real, "GPU": gpu_kinds(run)}
    if not facts["GPU"]:
        facts["CPU"] = (provenance.get("cpu") or {}).get("model")
    return facts


def gpu_kinds(run: Run) -> str:
    """The kinds of GPU that ``run`` trained on, as its first host told them; empty for a run on CPUs."""
    versions = run.record.provenance.get("versions") or {}
    if run.config.train.device == "cpu" or str(versions.get("torch", "")).endswith("+cpu"):
        return ""
    return ", ".join(sorted(set((run.record.provenance.get("gpus") or {}).get("names", ()))))


def _software(run: Run) -> Facts:
    provenance = run.record.provenance
    environment = provenance.get("environment") or {}
    git = provenance.get("git") or {}
    commit = git.get("commit")
    return {
        "python": provenance.get("python"),
        **dict(provenance.get("versions") or {}),
        "commit": f"{commit[:12]}{' with changes' if git.get('dirty') else ''}" if commit else None,
        "GPU driver": (provenance.get("gpus") or {}).get("driver"),
        "operating system": provenance.get("os"),
        "cores a worker": _cores(run),
        "warm-up rule": (run.record.throughput.model_extra or {}).get("warmup_rule"),
        **{name: value for name, value in environment.items() if name.startswith(_STEERING)},
    }


def _reduction(run: Run) -> Facts:
    return {"reduction": (run.record.wire.model_extra or {}).get("reduction")}


def _cores(run: Run) -> int | None:
    """Cores of a worker: those it is bound to, or its share where the workers of a node have all in common."""
    cpu = run.record.provenance.get("cpu") or {}
    if "cores_available" not in cpu or not cpu.get("cores_total"):
        return None
    share = int(cpu["cores_total"]) * run.size.nodes // run.size.workers
    return max(1, min(int(cpu["cores_available"]), share))


def _collect(runs: Sequence[Run], facts: Callable[[Run], Facts]) -> Iterator[tuple[str, list[tuple[Run, Any]]]]:
    ours = [(run, facts(run)) for run in runs]
    keys = dict.fromkeys(key for _, found in ours for key in found)
    for key in keys:
        yield key, [(run, found.get(key, _UNSET)) for run, found in ours]


def _variants(values: Sequence[tuple[Run, Any]]) -> str:
    """Each value with the first of its runs, and how many others."""
    by_value: dict[str, list[Run]] = {}
    for run, value in values:
        by_value.setdefault(str(value), []).append(run)
    return "; ".join(f"{value} in {listed([run.path for run in runs], 1)}" for value, runs in by_value.items())
