"""The main loader: DALI decodes, on CPU or GPU, exactly what the host asks for.

DALI is given bytes, windows and flips; its readers and random operators, which have a state of their own, are
not used, so a batch is a function of its request alone. The pipelines are in ``hpctrain.data.dali``.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.config.schema import DataConfig
from hpctrain.data.augment import Views
from hpctrain.data.dali import build_pipeline, take_output
from hpctrain.data.index import Index
from hpctrain.data.readahead import ReadAhead
from hpctrain.data.standins import GuardedReader
from hpctrain.data.types import Batch, Request
from hpctrain.errors import MachineError

#: Batches whose files are in memory, beside those that DALI has in work.
READ_AHEAD = 2


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A request with its files and views: all that DALI needs for it.

    ``files`` are uint8 arrays that share memory with the bytes read, ``corners`` and ``sizes`` [n, 2] and
    ``flips`` [n] int32 and contiguous: DALI reads all of them in place.
    """

    request: Request
    sample_ids: np.ndarray
    files: list[np.ndarray]
    corners: np.ndarray
    sizes: np.ndarray
    flips: np.ndarray

    def inputs(self) -> tuple[Any, ...]:
        """The pipeline's inputs, in its order."""
        return self.files, self.corners, self.sizes, self.flips

    def one(self, position: int) -> Prepared:
        """The sample at ``position`` by itself."""
        part = slice(position, position + 1)
        return Prepared(self.request, self.sample_ids[part], *(column[part] for column in self.inputs()))


class _Feed:
    """What a pipeline is fed from, and the batches it has in work.

    The pipeline refers to its feed, so the files that DALI reads in place outlive the pipeline, whatever
    error or interpreter exit ends it.
    """

    def __init__(self, coming: Iterator[Prepared]) -> None:
        self.coming = coming
        #: fed, output not yet taken
        self.in_work: deque[Prepared] = deque()

    def __call__(self) -> tuple[Any, ...]:
        """Called by DALI for each batch it starts; StopIteration tells it of the end."""
        prepared = next(self.coming)
        self.in_work.append(prepared)
        return prepared.inputs()


class DaliLoader:
    """See ``hpctrain.data.types.Loader``. One stream at a time; the pipeline is kept from one to the next."""

    name = "dali"

    def __init__(
        self, config: DataConfig, index: Index, *, seed: int, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self._config = config
        self._index = index
        self._device = device
        self._batch_size = batch_size
        self._threads = threads
        self._views = Views(config, seed, index)
        self._files = GuardedReader(config, index)
        self.corrupt = self._files.corrupt
        self._feed = _Feed(iter(()))
        self._pipeline: Any = None

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch a request; raises UserError when too many samples are corrupt."""
        read_ahead = ReadAhead(self._prepare, requests, READ_AHEAD)
        self._feed.coming = read_ahead
        try:
            self._schedule()
            while self._feed.in_work:
                images = self._take()
                prepared = self._feed.in_work.popleft()
                # Before the batch is used, so that decoding goes on while the trainer computes.
                self._schedule()
                labels = torch.from_numpy(self._index.labels[prepared.sample_ids])
                yield Batch(images, labels.to(self._device), prepared.request, prepared.sample_ids)
            self._pipeline.reset()
        except BaseException:
            self._drop_pipeline()  # it has batches in work that nobody will take
            raise
        finally:
            read_ahead.close()

    def close(self) -> None:
        """Give up the pipeline and close all files."""
        self._drop_pipeline()
        self._files.close()

    def _prepare(self, request: Request) -> Prepared:
        ids, files = self._files.fetch(request.sample_ids)
        windows, flips = self._views.of(request, ids)
        arrays = [np.frombuffer(data, dtype=np.uint8) for data in files]
        corners, sizes = (np.ascontiguousarray(part) for part in (windows[:, :2], windows[:, 2:]))
        return Prepared(request, ids, arrays, corners, sizes, flips.astype(np.int32))

    def _schedule(self) -> None:
        if self._pipeline is None:
            self._pipeline = build_pipeline(self._config, self._device, self._batch_size, self._threads, self._feed)
        self._pipeline.schedule_run()

    def _drop_pipeline(self) -> None:
        self._pipeline = None
        self._feed = _Feed(iter(()))

    def _take(self) -> Tensor:
        """Wait for the oldest batch in work; where a corrupt sample broke the pipeline, start again from there."""
        while True:
            try:
                return take_output(self._pipeline, self._device)
            except RuntimeError as error:
                failure = str(error)
            broken = self._feed
            self._drop_pipeline()
            self._report_corrupt(list(broken.in_work), failure)
            # Prepared anew, the corrupt samples have stand-ins.
            again = map(self._prepare, [batch.request for batch in broken.in_work])
            self._feed.coming = itertools.chain(again, broken.coming)
            self._schedule()

    def _report_corrupt(self, batches: list[Prepared], failure: str) -> None:
        """Report each sample of ``batches`` that cannot be decoded; raises MachineError when there is none."""
        # Pillow looks first: it says what is wrong with a file, which DALI does not.
        found = [
            self._files.judge(sample_id, data.tobytes())
            for batch in batches
            for sample_id, data in zip(batch.sample_ids.tolist(), batch.files, strict=True)
        ]
        if not any(found):
            found = [self._refuses(batch.one(position)) for batch in batches for position in range(len(batch.files))]
        if not any(found):
            raise MachineError(f"DALI failed on a batch whose pictures it decodes one by one: {failure}")

    def _refuses(self, sample: Prepared) -> bool:
        """Whether DALI cannot decode a sample that Pillow can; it is then reported."""
        try:
            build_pipeline(self._config, self._device, 1, 1, sample.inputs).run()
        except RuntimeError:
            self._files.report(int(sample.sample_ids[0]), "DALI cannot decode it, though Pillow can")
            return True
        return False
