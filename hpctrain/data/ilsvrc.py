"""The original ImageNet archives (ILSVRC 2012): nested tars of training, one tar of validation, labels in the devkit.

Training lies in one tar a class within ILSVRC2012_img_train.tar; it is read in place, nothing is unpacked.
Validation pictures are numbered; the devkit lists an ILSVRC2012_ID for each, and its meta.mat (a MATLAB file)
which WordNet id that is. Labels are the ranks of the sorted WordNet ids, as in torchvision and Keras.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hpctrain.data.folder import check_classes
from hpctrain.data.header import is_image_name
from hpctrain.data.sources import Entry, Source, members_of, read_range, tar_members
from hpctrain.errors import UserError

_WORDNET_ID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"


@dataclass(frozen=True)
class IlsvrcArchives:
    """Paths of the three archives as ImageNet hands them out."""

    train: Path
    val: Path
    devkit: Path


def ilsvrc_source(archives: IlsvrcArchives) -> Source:
    """Both splits of the archives; raises UserError where they do not fit together."""
    train = list(_train_members(archives.train))
    classes = tuple(sorted({wordnet_id for wordnet_id, _, _, _ in train}))
    check_classes(classes, str(archives.train))
    labels = {name: label for label, name in enumerate(classes)}
    entries = [
        Entry("train", labels[wordnet_id], name, str(archives.train), offset, size)
        for wordnet_id, name, offset, size in sorted(train)
    ]
    answers = read_devkit(archives.devkit)
    val = sorted(_val_members(archives.val))
    if [number for number, _, _, _ in val] != list(range(1, len(answers) + 1)):
        raise UserError(
            f"{archives.val} holds {len(val)} pictures and {archives.devkit} {len(answers)} answers, "
            "or numbers are missing: fetch both again"
        )
    for number, name, offset, size in val:
        if answers[number - 1] not in labels:
            raise UserError(f"{archives.devkit} gives {name} the class {answers[number - 1]}, which train lacks")
        entries.append(Entry("val", labels[answers[number - 1]], name, str(archives.val), offset, size))
    return Source(str(archives.train), classes, entries, read_range)


def read_devkit(path: Path) -> list[str]:
    """The WordNet id of each validation picture, in the order of their numbers."""
    files = _devkit_files(path)
    wordnet_ids = _wordnet_ids(files[_META], path)
    try:
        answers = [int(line) for line in files[_GROUND_TRUTH].split()]
        return [wordnet_ids[answer] for answer in answers]
    except (ValueError, KeyError) as error:
        raise UserError(f"{_GROUND_TRUTH} in {path} has an entry that {_META} does not explain: {error}") from error


def _train_members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """WordNet id, name, offset in the outer archive and length of each training picture."""
    classes = [(PurePosixPath(name).stem, offset, size) for name, offset, size in tar_members(path)]
    with open(path, "rb") as file:
        for wordnet_id, start, size in classes:
            if not _WORDNET_ID.fullmatch(wordnet_id):
                raise UserError(f"{path} holds {wordnet_id}, not a tar of a class: is it the train archive?")
            try:
                file.seek(start)
                # Offsets of the inner archive come out as those of the outer file: it is opened at its place.
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    for name, offset, length in members_of(inner, f"{path}:{wordnet_id}.tar", start + size):
                        yield wordnet_id, PurePosixPath(name).name, offset, length
            except tarfile.TarError as error:
                inner_name = f"{path}:{wordnet_id}.tar"
                raise UserError(f"{inner_name} is not a whole tar archive ({error}): fetch it again") from error


def _val_members(path: Path) -> Iterator[tuple[int, str, int, int]]:
    for name, offset, size in tar_members(path):
        base = PurePosixPath(name).name
        if not is_image_name(base):
            continue
        match = _VAL_NAME.fullmatch(base)
        if match is None:
            raise UserError(f"{path} holds {name}, not named as a validation picture: is it the val archive?")
        yield int(match[1]), base, offset, size


def _devkit_files(path: Path) -> dict[str, bytes]:
    wanted = {_META, _GROUND_TRUTH}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                base = PurePosixPath(member.name).name
                if base in wanted and (file := archive.extractfile(member)) is not None:
                    found[base] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read as the devkit archive ({error}): fetch it again") from error
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{path} lacks {missing[0]}: give the devkit of tasks 1 and 2")
    return found


def _wordnet_ids(meta: bytes, source: Path) -> dict[int, str]:
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
        from scipy.io.matlab import MatReadError  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"reading {_META} of {source} needs scipy: pip install scipy") from None
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except (MatReadError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(f"{_META} of {source} cannot be read ({error}): fetch the devkit again") from error
