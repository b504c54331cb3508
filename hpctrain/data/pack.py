"""`hpctrain data pack`: find out what a source is, list it and pack it."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from hpctrain.data.idx import has_idx_files, idx_source
from hpctrain.data.ilsvrc import IlsvrcArchives, ilsvrc_source
from hpctrain.data.manifest import WORK_FOLDER_NAME, is_packed
from hpctrain.data.packer import PLAN_NAME, PackOptions, PackResult, check_free, pack_source
from hpctrain.data.progress import Progress, show_progress
from hpctrain.data.shard import writing
from hpctrain.data.sources import Source, folder_source, tar_source
from hpctrain.errors import UserError

_COPY_BYTES = 1 << 20


def pack(
    source: Path | IlsvrcArchives,
    destination: Path,
    options: PackOptions | None = None,
    progress: Progress = show_progress,
) -> PackResult:
    """Pack an image folder, a .tar or .tar.gz of one, a folder with IDX files, or ImageNet's archives.

    A compressed tar is unpacked next to the shards for the time of packing, because they are written in
    another order than it has. Raises UserError and MachineError as ``pack_source`` does.
    """
    check_free(destination)
    work = destination / WORK_FOLDER_NAME
    try:
        listed = ilsvrc_source(source) if isinstance(source, IlsvrcArchives) else _open(source, destination, work)
        return pack_source(listed, destination, options, progress)
    except BaseException:
        if not (work / PLAN_NAME).exists():
            # Nothing was begun that a later run could go on with.
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                destination.rmdir()
        raise


def _open(source: Path, destination: Path, work: Path) -> Source:
    if not source.exists():
        raise UserError(f"{source} does not exist: name an image folder, a tar of one or a folder with IDX files")
    if source.is_dir():
        if is_packed(source):
            raise UserError(f"{source} is a packed data set: name the image folder or archive it was made from")
        if destination.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{destination} lies within {source}: choose a folder outside of what is packed")
        return idx_source(source) if has_idx_files(source) else folder_source(source)
    if source.name.endswith(".tar"):
        return tar_source(source)
    if source.name.endswith((".tar.gz", ".tgz")):
        unpacked = _decompress(source, work)
        return replace(tar_source(unpacked), description=str(source))
    raise UserError(f"{source} is neither a folder nor a .tar, .tar.gz or .tgz file: name one of these")


def _decompress(source: Path, work: Path) -> Path:
    """The tar of a .tar.gz, in the work folder; one that is there already is taken again."""
    status = source.stat()
    identity = f"{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    unpacked = work / f"source-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
    if unpacked.exists():
        return unpacked
    partial = unpacked.with_suffix(".partial")
    with writing(unpacked):
        work.mkdir(parents=True, exist_ok=True)
        output = open(partial, "wb")  # noqa: SIM115 - opened apart from the input: their errors differ
    try:
        with output, open(source, "rb") as packed:
            _inflate(packed, source, output, unpacked)
        os.replace(partial, unpacked)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return unpacked


def _inflate(packed: BinaryIO, source: Path, output: BinaryIO, target: Path) -> None:
    with gzip.open(packed) as stream:
        while True:
            try:
                piece = stream.read(_COPY_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{source} cannot be unpacked ({error}): fetch it again") from error
            if not piece:
                return
            with writing(target):
                output.write(piece)
