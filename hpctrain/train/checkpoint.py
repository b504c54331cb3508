"""Checkpoints: a folder per step, complete or absent, whose every byte is covered by a digest.

A checkpoint is ``checkpoints/step-000120/`` with one safetensors file per group of tensors and a
``manifest.json`` that names each file's size and SHA-256 and holds the plain numbers. It is written beside its
final name, flushed to the disk and renamed, so a process killed at any moment leaves either the whole of it or
nothing that looks like it. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hpctrain.errors import MachineError, UserError
from hpctrain.launch.continuing import in_run_dir
from hpctrain.metrics.layout import CHECKPOINT_PREFIX, MANIFEST_FILE, checkpoint_name, list_checkpoints

SCHEMA = 1

TensorGroups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by group ("model", "optimizer", "ema") and name, and the numbers beside them."""

    step: int
    tensors: TensorGroups
    numbers: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``checkpoint`` below ``folder``, remove all but the newest ``keep``, and return its path.

    Those of later steps go too: the run went on from an older one, spoilt or left behind as they were, and they
    would be taken for newer than this. Raises MachineError when the disk refuses; others are untouched then.
    """
    final = folder / checkpoint_name(checkpoint.step)
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{CHECKPOINT_PREFIX}*.partial"):  # of a save that was killed
            shutil.rmtree(leftover)
        partial.mkdir()
        _fill(partial, checkpoint)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync_folder(folder)
        known = list_checkpoints(folder)
        first = known.index(final)
        for other in known[:first] + known[first + keep :]:
            shutil.rmtree(other)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineError(
            f"cannot write checkpoint {final}: {_reason(error)}; make room and continue with "
            f"{in_run_dir(folder.parent)}"
        ) from error
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint; its tensors are on the CPU.

    Raises UserError when a file is missing, truncated or altered.
    """
    manifest = _read_manifest(path)
    tensors: TensorGroups = {}
    for name, expected in manifest["files"].items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise _unusable(path, f"{name} cannot be read ({error.strerror})") from error
        if len(content) != expected["bytes"]:
            raise _unusable(path, f"{name} has {len(content)} bytes instead of {expected['bytes']}")
        if _describe(content) != expected:
            raise _unusable(path, f"{name} does not match its digest")
        tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(content)
    return Checkpoint(manifest["step"], tensors, manifest["numbers"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise _unusable(path, f"{MANIFEST_FILE} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _unusable(path, f"{MANIFEST_FILE} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise _unusable(path, f"{MANIFEST_FILE} is not of schema {SCHEMA}")
    if manifest.pop("sha256", None) != _digest_of(manifest):
        raise _unusable(path, f"{MANIFEST_FILE} does not match its digest")
    return manifest


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(f"checkpoint {path} is not usable: {reason}; resume from an older one or start a new run")


def _reason(error: OSError | SafetensorError) -> str:
    """The system's words; safetensors has them in a sentence with the name of a file that nobody knows."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else str(error)


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the files of ``checkpoint`` into ``folder``, durably."""
    groups = {f"{group}.safetensors": tensors for group, tensors in checkpoint.tensors.items()}
    files = {name: _write_tensors(folder / name, tensors) for name, tensors in groups.items()}
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "step": checkpoint.step,
        "files": files,
        "numbers": checkpoint.numbers,
    }
    manifest["sha256"] = _digest_of(manifest)
    with open(folder / MANIFEST_FILE, "wb") as file:
        file.write(json.dumps(manifest, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a group durably and describe the file.

    safetensors writes from the tensors' own memory without the interpreter's lock, which packing them into bytes
    first would hold for as long as that takes, and the steps that go on meanwhile with it.
    """
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(packed, path)
    # It makes files for their owner alone; the folder was made with the rights that the user's mask leaves.
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _describe(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
