"""What passes between sampler, loaders and trainer: requests for samples in, batches of pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

Mode = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Request:
    """One micro-batch to be loaded.

    ``sample_ids`` [batch] int64, ids within the split; ``epoch`` decides crops and flips in "train" mode;
    the first ``valid`` samples count, the rest only fill the batch up to its size.
    """

    sample_ids: np.ndarray
    epoch: int
    valid: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class Batch:
    """A loaded micro-batch, in the order of its request.

    ``images`` [batch, channels, size, size] float32, normalised, on the loader's device; ``labels`` [batch]
    int64. The tensors stay valid until the next batch is asked for. ``sample_ids`` [batch] int64 are those shown,
    which differ from the request's where another picture stands in for one that cannot be decoded.
    """

    images: Tensor
    labels: Tensor
    request: Request
    sample_ids: np.ndarray


class Loader(Protocol):
    """Turns a stream of requests into a stream of batches, one for one; all its state is that stream."""

    #: name in the registry
    name: str
    #: one line naming each sample that could not be decoded and was replaced, in the order they came
    corrupt: list[str]

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch a request, reading ahead as far as the loader likes.

        Raises UserError when more than the configured share of samples is corrupt.
        """

    def close(self) -> None:
        """Stop threads and processes, close files."""
