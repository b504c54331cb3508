"""`hpctrain config`: what a configuration can say, without opening the source."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer


def print_config(
    section: Annotated[str | None, typer.Argument(metavar="SECTION", help="print its keys alone, as in train")] = None,
) -> None:
    """Print every key of a configuration as KEY=DEFAULT, with what it takes and what it means.

    A key is set in a YAML recipe, or by --set KEY=VALUE on the command line.
    """
    from hpctrain.config.describe import describe, to_text

    typer.echo(to_text(describe(section), shutil.get_terminal_size().columns))
