"""The main loader: DALI decodes, on CPU or GPU, exactly what the host asks for.

DALI is given bytes, windows and flips; its readers and random operators, which have a state of their own, are
not used, so a batch is a function of its request alone. The pipelines are in ``hpctrain.data.dali``.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.config.schema import DataConfig
from hpctrain.data.augment import Views
from hpctrain.data.dali import build_pipeline, take_output
from hpctrain.data.dali_trial import DaliTrial
from hpctrain.data.index import Index
from hpctrain.data.readahead import ReadAhead
from hpctrain.data.standins import GuardedReader
from hpctrain.data.types import Batch, Request
from hpctrain.errors import MachineError

#: Groups of batches whose files are in memory, beside those that DALI has in work.
READ_AHEAD = 2

#: Pictures that DALI gets at once, where a batch has fewer: its threads wait for each other after each operator, which
#: with 32 pictures on two threads left 12 % of the cores idle.
MIN_GROUP = 128


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One or more requests with their files and views: all that DALI needs for them.

    ``files`` are uint8 arrays that share memory with the bytes read, ``corners`` and ``sizes`` [n, 2] and
    ``flips`` [n] int32 and contiguous: DALI reads all of them in place.
    """

    requests: Sequence[Request]
    sample_ids: np.ndarray
    files: list[np.ndarray]
    corners: np.ndarray
    sizes: np.ndarray
    flips: np.ndarray

    def inputs(self) -> tuple[Any, ...]:
        """The pipeline's inputs, in its order."""
        return self.files, self.corners, self.sizes, self.flips


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
        #: requests in one run of the pipeline
        self._group = -(-MIN_GROUP // batch_size)
        self._threads = threads
        self._views = Views(config, seed, index)
        self._trial = DaliTrial(config, index, device)
        self._files = GuardedReader(config, index, self._trial)
        self.corrupt = self._files.corrupt
        self._feed = _Feed(iter(()))
        self._pipeline: Any = None

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch a request; raises UserError when too many samples are corrupt."""
        stream = iter(requests)
        groups = iter(lambda: tuple(itertools.islice(stream, self._group)), ())
        read_ahead = ReadAhead(self._prepare, groups, READ_AHEAD)
        self._feed.coming = read_ahead
        try:
            self._schedule()
            while self._feed.in_work:
                images = self._take()
                prepared = self._feed.in_work.popleft()
                # Before the batch is used, so that decoding goes on while the trainer computes.
                self._schedule()
                yield from self._batches(prepared, images)
            self._pipeline.reset()
        except BaseException:
            self._drop_pipeline()  # it has batches in work that nobody will take
            raise
        finally:
            read_ahead.close()

    def close(self) -> None:
        """Give up the pipeline and close all files."""
        self._drop_pipeline()
        self._trial.close()
        self._files.close()

    def _batches(self, prepared: Prepared, images: Tensor) -> Iterator[Batch]:
        labels = torch.from_numpy(self._index.labels[prepared.sample_ids]).to(self._device)
        start = 0
        for request in prepared.requests:
            part = slice(start, start + len(request.sample_ids))
            yield Batch(images[part], labels[part], request, prepared.sample_ids[part])
            start = part.stop

    def _prepare(self, requests: Sequence[Request]) -> Prepared:
        ids, files = self._files.fetch(np.concatenate([request.sample_ids for request in requests]))
        starts = np.cumsum([len(request.sample_ids) for request in requests])[:-1]
        views = [self._views.of(request, part) for request, part in zip(requests, np.split(ids, starts), strict=True)]
        windows, flips = (np.concatenate(column) for column in zip(*views, strict=True))
        arrays = [np.frombuffer(data, dtype=np.uint8) for data in files]
        corners, sizes = (np.ascontiguousarray(part) for part in (windows[:, :2], windows[:, 2:]))
        return Prepared(requests, ids, arrays, corners, sizes, flips.astype(np.int32))

    def _schedule(self) -> None:
        if self._pipeline is None:
            most = self._group * self._batch_size
            self._pipeline = build_pipeline(self._config, self._device, most, self._threads, self._feed)
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
            again = map(self._prepare, [group.requests for group in broken.in_work])
            self._feed.coming = itertools.chain(again, broken.coming)
            self._schedule()

    def _report_corrupt(self, batches: list[Prepared], failure: str) -> None:
        """Report each sample of ``batches`` that cannot be decoded; raises MachineError when there is none."""
        samples = [
            (sample_id, data.tobytes())
            for batch in batches
            for sample_id, data in zip(batch.sample_ids.tolist(), batch.files, strict=True)
        ]
        # Pillow looks first: it says what is wrong with a file, which DALI does not.
        found = [self._files.judge(sample_id, data) for sample_id, data in samples]
        if any(found):
            return
        faults = {sample_id: self._trial(sample_id, data) for sample_id, data in samples}
        if not any(faults.values()):
            raise MachineError(f"DALI failed on a batch whose pictures it decodes one by one: {failure}")
        for sample_id, fault in faults.items():
            if fault is not None:
                self._files.report(sample_id, fault)
