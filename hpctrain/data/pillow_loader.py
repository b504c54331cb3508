"""The loader for machines without DALI: torch's DataLoader, whose workers decode with Pillow.

It shows the same windows as DALI does, slower. Workers get whole requests and answer in the order asked;
they draw no random numbers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property
from multiprocessing import connection, context, get_context, parent_process, resource_tracker
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpctrain.config.schema import DataConfig
from hpctrain.data.augment import Views
from hpctrain.data.decode import decode
from hpctrain.data.index import Index
from hpctrain.data.normalise import Normaliser
from hpctrain.data.standins import GuardedReader
from hpctrain.data.types import Batch, Request
from hpctrain.errors import HpctrainError
from hpctrain.topology.probe import Probe

#: Requests a worker has in hand or done.
PREFETCH = 2

#: Signals that mean something to the trainer and nothing to its workers.
_TRAINERS_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP})

#: Pictures uint8 [batch, size, size, channels], the ids [batch] they have, and the samples reported since the last
#: answer; or the error that ends the stream (raised in a worker, it would come with the worker's traceback as its
#: text).
_Answer = tuple[Tensor, Tensor, list[tuple[int, str]]] | HpctrainError


class PillowBatches(Dataset[_Answer]):
    """Decodes requests. Each worker has its own copy, which learns of corrupt samples by itself."""

    def __init__(self, config: DataConfig, index: Index, seed: int) -> None:
        self._config = config
        self._index = index
        self._views = Views(config, seed, index)

    @cached_property
    def _files(self) -> GuardedReader:
        # Made where it is first used: open files and locks do not travel to a worker.
        return GuardedReader(self._config, self._index)

    def __getitem__(self, request: Request) -> _Answer:
        told = len(self._files.faults)
        try:
            pictures = None
            while pictures is None:
                ids, files = self._files.fetch(request.sample_ids)
                pictures = self._decode(request, ids, files)
        except HpctrainError as error:
            return error
        return torch.from_numpy(pictures), torch.from_numpy(ids), list(self._files.faults.items())[told:]

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def _decode(self, request: Request, ids: np.ndarray, files: list[bytes]) -> np.ndarray | None:
        """Pictures of the samples, or None when one was found corrupt (and reported)."""
        size, channels = self._config.image_size, self._config.channels
        windows, flips = self._views.of(request, ids)
        pictures = np.empty((len(ids), size, size, channels), dtype=np.uint8)
        for row, (sample_id, data, window, flip) in enumerate(zip(ids, files, windows, flips, strict=True)):
            record = self._index.samples[sample_id]
            try:
                pictures[row] = decode(data, record, window, bool(flip), size, channels)
            except Exception:  # whatever Pillow meets in a broken file; in a sound one, the fault is ours
                if self._files.judge(int(sample_id), data):
                    return None
                raise
        return pictures


class _Replayed:
    """The sampler of a DataLoader that outlives a stream: iterates over whatever stream it was given last."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()
        #: handed to workers, not answered yet
        self.pending: deque[Request] = deque()

    def __iter__(self) -> Iterator[Request]:
        for request in self.requests:
            self.pending.append(request)
            yield request


class PillowLoader:
    """See ``hpctrain.data.types.Loader``. One thread decodes in this process, more are as many workers."""

    name = "torch"

    def __init__(
        self, config: DataConfig, index: Index, *, seed: int, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self._device = device
        self._labels = torch.from_numpy(index.labels)
        self._batches = PillowBatches(config, index, seed)
        self._files = GuardedReader(config, index)
        self.corrupt = self._files.corrupt
        self._normalise = Normaliser(config, batch_size, device)
        self._stream = _Replayed()
        workers = threads if threads > 1 else 0
        self._loader: Any = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._stream,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            **(_worker_options() if workers else {}),
        )

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch a request; raises UserError when too many samples are corrupt."""
        self._stream.requests = requests
        self._stream.pending.clear()
        with _BlockedSignals():  # what is started here starts with the trainer's signals blocked
            answers = iter(self._loader)
        try:
            for answer in answers:
                if isinstance(answer, HpctrainError):
                    raise answer
                pictures, sample_ids, faults = answer
                for sample_id, reason in faults:
                    self._files.report(sample_id, reason)
                labels = self._labels[sample_ids].to(self._device)
                yield Batch(self._normalise(pictures), labels, self._stream.pending.popleft(), sample_ids.numpy())
        finally:
            del answers  # else an error's traceback keeps the workers alive beyond ``close``

    def close(self) -> None:
        """End the workers, close all files."""
        self._loader = None
        self._batches.close()
        self._files.close()


class _BlockedSignals:
    """Blocks the trainer's signals for this thread; processes started meanwhile inherit that for good.

    Not only the workers must be deaf: they end with the server they were forked from, should a signal to the
    whole job step kill it.
    """

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
        # Started by the first worker otherwise, and with a side effect: it unblocks two signals in its parent.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


def _worker_options() -> dict[str, Any]:
    # Not fork: the trainer's process has threads of MPI, Horovod or CUDA, and a forked copy of their locks hangs.
    forkserver: context.BaseContext = get_context("forkserver")
    forkserver.set_forkserver_preload([__name__])
    return {"multiprocessing_context": forkserver, "prefetch_factor": PREFETCH, "persistent_workers": True}


def _as_it_is(answer: Any) -> Any:
    return answer


def _start_worker(worker: int) -> None:
    """Deaf to the trainer's signals, but dead when the trainer says so or is dead itself, however it ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    for watch in (_obey_parent, _die_with_parent):
        threading.Thread(target=watch, name=f"hpctrain-{watch.__name__}-{worker}", daemon=True).start()


def _parent() -> Any:
    parent = parent_process()
    assert parent is not None
    return parent


def _obey_parent() -> None:
    # Slurm and launchers send SIGTERM to all processes of a job, the parent sends it to its children at exit.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != _parent().pid:
        pass
    os._exit(0)


def _die_with_parent() -> None:
    connection.wait([_parent().sentinel])
    os._exit(1)


def probe() -> Probe:
    """It works wherever hpctrain does."""
    return Probe("torch", True, versions={"torch": torch.__version__, "pillow": PIL.__version__})
