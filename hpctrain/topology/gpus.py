"""The GPUs of this host and their driver, as NVML tells of them: without torch, and without a context on any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpus:
    """``names`` and ``memory_bytes`` by number; ``cuda`` is the newest CUDA that the driver is for, as (13, 0)."""

    names: tuple[str, ...]
    memory_bytes: tuple[int, ...]
    driver: str
    cuda: tuple[int, int]


def read_gpus() -> Gpus:
    """What there is, which may be none.

    Raises LookupError where NVML's bindings or the driver are missing, or do not answer.
    """
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise LookupError("pynvml is not installed") from error
    try:
        pynvml.nvmlInit()
        try:
            return _read(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise LookupError(f"NVML: {error}") from error


def _read(nvml: Any) -> Gpus:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    return Gpus(
        names=tuple(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles),
        memory_bytes=tuple(nvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda=(cuda // 1000, cuda % 1000 // 10),
    )


def _text(value: str | bytes) -> str:
    """Bindings before version 11.5 gave bytes."""
    return value.decode() if isinstance(value, bytes) else value
