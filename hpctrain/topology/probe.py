"""What an engine or a loader says of itself when asked whether it works here.

Each engine (``hpctrain.comm.<name>``) and loader (``hpctrain.data.<name>``) has a function ``probe() -> Probe``
that imports its library and looks, without joining a job or touching another rank. It reports, it never
raises: a library that is missing or unfit is an answer. ``hpctrain doctor`` calls it in a child process.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Probe:
    """The answer of one engine or loader.

    ``versions`` is library to version; ``built_with`` the parts it was compiled with or may use ("NCCL", "MPI",
    "gloo", "MPI_THREAD_MULTIPLE", …); where ``ok`` is false, ``reason`` tells why and ``remedy`` what to type.
    Where it is true they may be empty, or tell of a weakness that does not keep it from working.
    """

    name: str
    ok: bool
    versions: dict[str, str] = field(default_factory=dict)
    built_with: tuple[str, ...] = ()
    reason: str = ""
    remedy: str = ""
