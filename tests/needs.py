"""What a test needs of the machine: missing on a user's machine it is skipped with the reason, in CI it fails."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and in CI it must be", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def needs(*modules: str) -> None:
    """Skip the calling test or module unless each of ``modules`` is installed; under CI=true fail instead."""
    for module in modules:
        if not _installed(module):
            _missing(f"{module} is not installed")


def needs_commands(*commands: str) -> None:
    """The same for programs on PATH."""
    for command in commands:
        if shutil.which(command) is None:
            _missing(f"{command} is not on PATH")


def needs_gpu() -> None:
    """Skip the calling test or module on a machine whose torch sees no GPU; CI has none either."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU", allow_module_level=True)
