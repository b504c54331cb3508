"""Loaders by name: which there are, which one `auto` takes here, and one made to order.

A loader is a line in ``LOADERS`` and one in ``PROBES``; its module is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.index import Index
from hpctrain.data.types import Loader
from hpctrain.errors import UserError
from hpctrain.topology.probe import Probe

#: name -> class
LOADERS = {
    "dali": "hpctrain.data.dali_loader:DaliLoader",
    "torch": "hpctrain.data.pillow_loader:PillowLoader",
    "synthetic": "hpctrain.data.synthetic:SyntheticLoader",
}

#: name -> function that tells whether the loader works here
PROBES = {
    "dali": "hpctrain.data.dali:probe",
    "torch": "hpctrain.data.pillow_loader:probe",
    "synthetic": "hpctrain.data.synthetic:probe",
}


def probe(name: str) -> Probe:
    """Whether the loader ``name`` works here; raises UserError when there is none of that name."""
    found: Probe = _load(PROBES, name)()
    return found


def choose(requested: str) -> tuple[str, str]:
    """The loader to take for ``data.loader`` = ``requested``, and the reason in words.

    Only "auto" falls back. Raises UserError when the loader asked for does not work here.
    """
    wanted = "dali" if requested == "auto" else requested
    found = probe(wanted)
    if found.ok:
        return wanted, "asked for" if requested != "auto" else "DALI works here"
    if requested == "auto":
        return "torch", f"{found.reason}; {found.remedy} for the faster loader"
    raise UserError(
        f"data.loader={requested} does not work here: {found.reason}; {found.remedy}, or set data.loader=auto"
    )


def make_loader(
    config: DataConfig, index: Index, *, seed: int, device: torch.device, batch_size: int, threads: int
) -> Loader:
    """The loader that ``config`` asks for, for the samples of ``index``.

    Its batches have ``batch_size`` pictures on ``device``; ``threads`` decode. Raises UserError when it does
    not work here, or cannot do what is asked.
    """
    name, _ = choose(config.loader)
    if config.decode == "gpu" and (name != "dali" or device.type != "cuda"):
        raise UserError(
            f"data.decode=gpu needs DALI and a GPU, this run has {name} on {device.type}: set data.decode=auto"
        )
    made: Loader = _load(LOADERS, name)(config, index, seed=seed, device=device, batch_size=batch_size, threads=threads)
    return made


def _load(table: dict[str, str], name: str) -> Any:
    if name not in table:
        raise UserError(f"data.loader={name} is unknown: it is one of {', '.join(table)}, or auto")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
