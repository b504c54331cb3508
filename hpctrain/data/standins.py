"""Samples that cannot be decoded: who stands in for them, how they are named, and when it is too many.

The stand-in of a sample is the next one, by id, that can be decoded: a property of the data alone, so that
every loader, rank and restart shows the same. Stand-ins bring their own label and window. Decoding is not done
here (``hpctrain.data.decode`` judges).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpctrain.config.schema import DataConfig
from hpctrain.data.decode import fault_of
from hpctrain.data.index import Index
from hpctrain.data.reader import SampleReader
from hpctrain.data.soundness import is_sound
from hpctrain.errors import UserError

#: Tries a file that Pillow decodes, by sample id, with the loader's own decoder; says what fault that finds.
Trial = Callable[[int, bytes], str | None]


class GuardedReader:
    """The files of one index, each sound or tried, with stand-ins for those that are of no use.

    ``faults`` has each sample found unusable, ``corrupt`` a line that names it, in the order they came. Two
    threads may use it.
    """

    def __init__(self, config: DataConfig, index: Index, trial: Trial | None = None) -> None:
        self.corrupt: list[str] = []
        self._config = config
        self._index = index
        self._reader = SampleReader(index)
        self._trial = trial
        #: a byte a sample, 1 from when its file was found sound or passed its trial
        self._usable = bytearray(len(index))
        #: sample id -> what is wrong with it
        self.faults: dict[int, str] = {}
        self._judged_good: set[int] = set()

    def fetch(self, sample_ids: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        """Ids [n] int64 with stand-ins in place, and their files.

        A file is looked at the first time it is met. One that is not plainly sound is decoded as a whole by Pillow,
        whatever part of it the loader will look at, and then by the loader's trial. Raises UserError when too
        many are corrupt, MachineError when one cannot be read.
        """
        ids = self._with_stand_ins(sample_ids)
        files = self._reader.read(ids)
        for position, data in enumerate(files):
            while not self._is_usable(int(ids[position]), data):
                ids[position : position + 1] = self._with_stand_ins(ids[position : position + 1])
                data = files[position] = self._reader.read(ids[position : position + 1])[0]
        return ids, files

    def judge(self, sample_id: int, data: bytes) -> bool:
        """Whether Pillow or the index finds fault with a sample, which is then reported."""
        if sample_id in self.faults:
            return True
        if sample_id in self._judged_good:
            return False
        fault = fault_of(data, self._index.samples[sample_id])
        if fault is None:
            self._judged_good.add(sample_id)
            return False
        self.report(sample_id, fault)
        return True

    def report(self, sample_id: int, reason: str) -> None:
        """Count a sample as corrupt from now on; raises UserError when that makes too many."""
        if sample_id in self.faults:
            return
        self.faults[sample_id] = reason
        name = self._index.name(sample_id)
        self.corrupt.append(f"{name}: {reason}")
        count, samples, limit = len(self.faults), len(self._index), self._config.max_corrupt_share
        if count > limit * samples or count == samples:
            raise UserError(
                f"{count} of {samples} samples ({count / samples:.2%}) cannot be decoded, more than "
                f"data.max_corrupt_share = {limit:.2%} allows, the last one being {name} ({reason}): "
                f"run `hpctrain data verify {self._config.path}` to list them all"
            )

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _is_usable(self, sample_id: int, data: bytes) -> bool:
        if self._usable[sample_id]:
            return True
        if not is_sound(data, self._index.samples[sample_id]):
            if self.judge(sample_id, data):
                return False
            fault = self._trial(sample_id, data) if self._trial else None
            if fault is not None:
                self.report(sample_id, fault)
                return False
        self._usable[sample_id] = 1
        return True

    def _with_stand_ins(self, sample_ids: np.ndarray) -> np.ndarray:
        ids = sample_ids.copy()
        if self.faults:
            for position, sample_id in enumerate(ids.tolist()):
                while sample_id in self.faults:
                    sample_id = (sample_id + 1) % len(self._index)
                ids[position] = sample_id
        return ids
