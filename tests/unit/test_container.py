"""Which image a run was in: what its header and the digest beside it tell, and nothing that could be stale."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from hpctrain.metrics.container import container, container_sha256

ID = UUID("b2659d4e-bd50-4ea5-bd17-eec5e54f918e")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of Apptainer's format, as far as anything looks."""
    launch = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0")
    times = (1504657553).to_bytes(8, "little") + (1504657653).to_bytes(8, "little")
    path = tmp_path / "my image.sif"
    path.write_bytes(launch + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + ID.bytes + times + bytes(1000))
    return path


@pytest.mark.parametrize("name", ["APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"])
def test_an_image_is_told_by_its_header(image: Path, name: str) -> None:
    assert container({name: str(image)}) == {
        "image": "my image.sif",
        "bytes": 1080,
        "id": str(ID),
        "modified_utc": "2017-09-06T00:27:33+00:00",
    }


def test_without_a_container_there_is_nothing_to_tell() -> None:
    assert container({}) is None
    assert container({"APPTAINER_CONTAINER": ""}) is None
    assert container_sha256({}) is None


@pytest.mark.parametrize("content", [None, b"", b"hsqs" + bytes(200)])
def test_what_is_out_of_sight_or_of_another_format_has_a_name_at_least(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "old.img"
    if content is not None:
        path.write_bytes(content)
    size = None if content is None else len(content)
    told = container({"APPTAINER_CONTAINER": str(path)})
    assert told == {"image": "old.img", "bytes": size, "id": None, "modified_utc": None}


def test_the_digest_is_the_one_that_sha256sum_left_beside_the_image(image: Path) -> None:
    environment = {"APPTAINER_CONTAINER": str(image)}
    with pytest.raises(
        LookupError, match=r"there is no .*/my image\.sif\.sha256 in sight: once an image is built, `sha"
    ):
        container_sha256(environment)
    done = subprocess.run(["sha256sum", image.name], cwd=image.parent, capture_output=True, text=True, check=True)
    beside = image.with_name("my image.sif.sha256")
    beside.write_text(done.stdout)
    assert container_sha256(environment) == done.stdout.split()[0]


def test_a_digest_older_than_the_image_is_not_its_own(image: Path) -> None:
    beside = image.with_name("my image.sif.sha256")
    beside.write_text("0" * 64 + "  my image.sif\n")
    os.utime(beside, (1, 1))
    with pytest.raises(LookupError, match="is older than the image: once an image is built"):
        container_sha256({"APPTAINER_CONTAINER": str(image)})


def test_what_is_no_digest_is_not_recorded(image: Path) -> None:
    image.with_name("my image.sif.sha256").write_text("no digest\n")
    with pytest.raises(LookupError, match="does not begin with a SHA-256: once"):
        container_sha256({"APPTAINER_CONTAINER": str(image)})
