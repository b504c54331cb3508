"""Names of files and folders in a run directory, for those that write them and those that read them without torch."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"
PREFLIGHT_FILE = "preflight.json"
LAUNCHES_FILE = "launches.jsonl"
STEPS_FILE = "steps.jsonl"
EVALS_FILE = "evals.jsonl"
RECORD_FILE = "record.json"
PICTURE_FILE = "learning-curve.png"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"

CHECKPOINT_PREFIX = "step-"
#: of a checkpoint; a folder without one is none
MANIFEST_FILE = "manifest.json"


def checkpoint_name(step: int) -> str:
    return f"{CHECKPOINT_PREFIX}{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint that ``list_checkpoints`` has found."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below ``folder`` by name, newest first; their content is not looked at."""
    if not folder.is_dir():
        return []
    prefix = CHECKPOINT_PREFIX
    names = (path for path in folder.iterdir() if path.name.startswith(prefix))
    return sorted((path for path in names if path.name.removeprefix(prefix).isdecimal()), key=step_of, reverse=True)
