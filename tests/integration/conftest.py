"""Small sets of pictures that the tests of whole commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.data.digits import make_digits
from tests.needs import needs


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, packed: 1,438 to train on, 359 held out, a number that only 1 divides."""
    needs("sklearn")
    folder = tmp_path_factory.mktemp("sets") / "digits"
    make_digits(folder)
    return folder
