"""Checkpoints written by a thread while steps go on: copied first, then written as ``checkpoint`` does it.

One rank's affair. When to save, and what the others do meanwhile, is ``saver``'s.
"""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from hpctrain.errors import MachineError
from hpctrain.train.checkpoint import Checkpoint, TensorGroups, save_checkpoint


class CheckpointWriter:
    """Writes below ``folder``, one checkpoint at a time, keeping the newest ``keep``.

    Takes the memory of one checkpoint on the host, for as long as it lives: copying into memory that is there
    already takes a fraction of the time.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        #: seconds from the copy to the folder's final name, of each checkpoint written
        self.write_s: list[float] = []
        self._folder, self._keep = folder, keep
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, checkpoint: Checkpoint) -> None:
        """Copy ``checkpoint``, whose tensors may change when this returns, and write the copy. Nothing may be under
        way."""
        assert self._thread is None
        copied = Checkpoint(checkpoint.step, self._copy(checkpoint.tensors), copy.deepcopy(checkpoint.numbers))
        # A daemon: a job that ends by an error does not stay for a checkpoint that nobody waits for.
        self._thread = threading.Thread(target=self._write, args=(copied,), name="hpctrain-checkpoint", daemon=True)
        self._thread.start()

    def idle(self, timeout_s: float) -> bool:
        """Whether nothing is under way any more, after ``timeout_s`` at the most."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def finished(self, timeout_s: float) -> bool:
        """The same; raises MachineError when what was under way could not be written."""
        idle = self.idle(timeout_s)
        if idle and self._error is not None:
            error, self._error = self._error, None
            raise error
        return idle

    def _write(self, checkpoint: Checkpoint) -> None:
        started_s = time.perf_counter()
        try:
            save_checkpoint(self._folder, checkpoint, self._keep)
        except MachineError as error:
            self._error = error
        except Exception as error:  # whatever it is, the training thread must hear of it
            self._error = MachineError(f"writing the checkpoint of step {checkpoint.step} failed: {error!r}")
            self._error.__cause__ = error
        else:
            self.write_s.append(time.perf_counter() - started_s)

    @torch.no_grad()
    def _copy(self, groups: TensorGroups) -> TensorGroups:
        """On the host, in the order of indices."""
        live = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        for key, tensor in live.items():
            held = self._copies.get(key)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[key].copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in live.values()):
            torch.cuda.synchronize()
        return {group: {name: self._copies[group, name] for name in tensors} for group, tensors in groups.items()}
