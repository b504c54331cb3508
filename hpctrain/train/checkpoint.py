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
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from hpctrain.errors import MachineError, UserError

SCHEMA = 1
_MANIFEST = "manifest.json"
_PREFIX = "step-"

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
    final = folder / f"{_PREFIX}{checkpoint.step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{_PREFIX}*.partial"):  # of a save that was killed
            shutil.rmtree(leftover)
        partial.mkdir()
        files = {f"{group}.safetensors": _pack(tensors) for group, tensors in checkpoint.tensors.items()}
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "step": checkpoint.step,
            "files": {name: _describe(content) for name, content in files.items()},
            "numbers": checkpoint.numbers,
        }
        manifest["sha256"] = _digest_of(manifest)
        for name, content in files.items():
            _write_durably(partial / name, content)
        _write_durably(partial / _MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(partial)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync_folder(folder)
        known = list_checkpoints(folder)
        first = known.index(final)
        for other in known[:first] + known[first + keep :]:
            shutil.rmtree(other)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineError(
            f"cannot write checkpoint {final}: {error.strerror or error}; make room and go on with --resume auto"
        ) from error
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below ``folder`` by name, newest first; their content is not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(_PREFIX) and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


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
        manifest = json.loads((path / _MANIFEST).read_bytes())
    except OSError as error:
        raise _unusable(path, f"{_MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _unusable(path, f"{_MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise _unusable(path, f"{_MANIFEST} is not of schema {SCHEMA}")
    if manifest.pop("sha256", None) != _digest_of(manifest):
        raise _unusable(path, f"{_MANIFEST} does not match its digest")
    return manifest


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(f"checkpoint {path} is not usable: {reason}; resume from an older one or start a new run")


def _pack(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _describe(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
