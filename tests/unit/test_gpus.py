"""GPUs as NVML tells of them, by bindings of any age, and what there is without."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from hpctrain.topology.gpus import Gpus, read_gpus


class NVMLError(Exception):
    pass


def bindings(encode: Callable[[str], Any] = str, **other: Any) -> types.SimpleNamespace:
    """Of two GPUs; ``calls`` tells that NVML was left as it was found."""
    calls: list[str] = []
    return types.SimpleNamespace(
        **{
            "calls": calls,
            "NVMLError": NVMLError,
            "nvmlInit": lambda: calls.append("init"),
            "nvmlShutdown": lambda: calls.append("shutdown"),
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: encode(f"GPU {handle}"),
            "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=1 + handle),
            "nvmlSystemGetDriverVersion": lambda: encode("580.1"),
            "nvmlSystemGetCudaDriverVersion": lambda: 12080,
            **other,
        }
    )


@pytest.mark.parametrize("encode", [str, str.encode], ids=["text", "bytes of older bindings"])
def test_gpus_and_their_driver(monkeypatch: pytest.MonkeyPatch, encode: Callable[[str], Any]) -> None:
    nvml = bindings(encode)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert read_gpus() == Gpus(names=("GPU 0", "GPU 1"), memory_bytes=(1, 2), driver="580.1", cuda=(12, 8))
    assert nvml.calls == ["init", "shutdown"]


def test_a_driver_that_does_not_answer_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NVMLError("Driver Not Loaded")

    for function, calls in (("nvmlInit", []), ("nvmlDeviceGetCount", ["init", "shutdown"])):
        nvml = bindings(**{function: fail})
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        with pytest.raises(LookupError, match="NVML: Driver Not Loaded"):
            read_gpus()
        assert nvml.calls == calls


def test_without_bindings_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(LookupError, match="pynvml is not installed"):
        read_gpus()
