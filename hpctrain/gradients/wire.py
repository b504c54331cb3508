"""What a bucket looks like on its way: the buffer an engine is handed, and the way there and back.

A wire knows nothing of ranks or reductions; ``none`` sends the gradients as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Wire(ABC):
    """The travelling form of one ``bucket`` [n]; allocates whatever it needs once."""

    def __init__(self, bucket: Tensor) -> None:
        self.bucket = bucket

    @property
    @abstractmethod
    def buffer(self) -> Tensor:
        """What the engine is handed, the same memory each step."""

    @abstractmethod
    def encode(self) -> None:
        """Bring this rank's gradients from the bucket into ``buffer``."""

    @abstractmethod
    def decode(self) -> None:
        """Bring the sum over ranks from ``buffer`` into the bucket."""


class PlainWire(Wire):
    """The bucket itself: its own dtype, no copy."""

    @property
    def buffer(self) -> Tensor:
        return self.bucket

    def encode(self) -> None:
        return

    def decode(self) -> None:
        return
