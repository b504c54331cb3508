"""What a test needs of the machine: missing on a user's machine it is skipped with the reason, in CI it fails."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needs(*modules: str) -> None:
    """Skip the calling test or module unless each of ``modules`` imports; under CI=true fail instead."""
    for module in modules:
        if importlib.util.find_spec(module.split(".")[0]) is not None:
            continue
        reason = f"{module} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and in CI it must be", pytrace=False)
        pytest.skip(reason, allow_module_level=True)
