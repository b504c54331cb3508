"""What several commands share: arguments that mean the same everywhere, and how they import what is heavy."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ConfigPath = Annotated[Path, typer.Argument(help="YAML recipe, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change one key, as in train.epochs=5; repeatable"),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result there as JSON")]


class JsonMayStandAlone(TyperCommand):
    """A command whose ``--json`` without a FILE right behind it means standard output, which is written ``-`` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        alone = [
            word == "--json" and behind.startswith("-") and behind != "-" for word, behind in pairwise([*args, "--"])
        ]
        words = ["--json=-" if is_alone else word for word, is_alone in zip(args, alone, strict=True)]
        return super().parse_args(ctx, words)


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Around heavy imports: there Ctrl-C may come out as any error of a library, with its traceback."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
