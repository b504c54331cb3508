"""Which container image a process runs in, told without reading the image: it may have many GB.

What identifies an image is made once, when it is built: the identifier that Apptainer writes into its header, and the
digest that ``sha256sum IMAGE > IMAGE.sha256`` leaves beside it. No digest is computed here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

#: Head of an image in the Singularity Image Format: launch script, magic, version, architecture, identifier, time of
#: creation and of the last change in seconds since 1970 (sylabs/sif, pkg/sif/sif.go, type Header).
_HEADER = struct.Struct("<32s10s3s3s16sqq")
_MAGIC = b"SIF_MAGIC\0"


def image_of(environment: Mapping[str, str]) -> Path | None:
    """The image of the Apptainer or Singularity container around this process, as its host names it."""
    image = environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER")
    return Path(image) if image else None


def container(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Name, size, identifier and last change of the image, the latter three where it is in sight; None without one."""
    image = image_of(environment)
    if image is None:
        return None
    told: dict[str, Any] = {"image": image.name, "bytes": None, "id": None, "modified_utc": None}
    if image.is_file():
        told["bytes"] = image.stat().st_size
        with image.open("rb") as stream:
            head = stream.read(_HEADER.size)
        if len(head) == _HEADER.size and (fields := _HEADER.unpack(head))[1] == _MAGIC:
            told["id"] = str(UUID(bytes=fields[4]))
            told["modified_utc"] = datetime.fromtimestamp(fields[6], UTC).isoformat(timespec="seconds")
    return told


def container_sha256(environment: Mapping[str, str]) -> str | None:
    """The digest that stands beside the image, in hex; None without a container.

    Raises LookupError where there is none or it is older than the image.
    """
    image = image_of(environment)
    if image is None:
        return None
    beside = image.with_name(f"{image.name}.sha256")
    remedy = f"once an image is built, `sha256sum {image.name} > {beside.name}` beside it"
    if not beside.is_file():
        raise LookupError(f"there is no {beside} in sight: {remedy}")
    if beside.stat().st_mtime < image.stat().st_mtime:
        raise LookupError(f"{beside} is older than the image: {remedy}")
    digest = re.match(r"[0-9a-f]{64}\b", beside.read_text())
    if digest is None:
        raise LookupError(f"{beside} does not begin with a SHA-256: {remedy}")
    return digest[0]
