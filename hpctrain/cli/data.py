"""`hpctrain data …`: prepare and check data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hpctrain.cli.options import JsonFile
from hpctrain.errors import UserError

data_app = typer.Typer(name="data", help="Prepare and check data sets.", no_args_is_help=True)


@data_app.command()
def pack(
    source: Annotated[list[Path], typer.Argument(help="image folder, tar of one, or folder of IDX files")],
    destination: Annotated[Path, typer.Argument(help="folder to be made")],
    ilsvrc: Annotated[
        bool, typer.Option("--ilsvrc", help="SOURCE is TRAIN.tar VAL.tar DEVKIT.tar.gz, as ImageNet ships them")
    ] = False,
    shard_mb: Annotated[int, typer.Option(min=1, help="size of a shard")] = 256,
    skip_corrupt: Annotated[bool, typer.Option(help="leave out pictures that cannot be read, naming them")] = False,
) -> None:
    """Write SOURCE as WebDataset shards with an index; run again, it goes on where it was stopped."""
    from hpctrain.data.ilsvrc import IlsvrcArchives
    from hpctrain.data.pack import pack as pack_into
    from hpctrain.data.packer import PackOptions

    if len(source) != (3 if ilsvrc else 1):
        raise UserError(
            "--ilsvrc takes TRAIN.tar VAL.tar DEVKIT.tar.gz and the destination; without it name one source"
        )
    wanted = IlsvrcArchives(*source) if ilsvrc else source[0]
    options = PackOptions(shard_mb=shard_mb, skip_corrupt=skip_corrupt)
    typer.echo(pack_into(wanted, destination, options).summary())


@data_app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="packed or image folder")],
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; default: the cores at hand")] = None,
    json_file: JsonFile = None,
) -> None:
    """Decode every picture of PATH and list what is wrong; exit 1 when anything is."""
    from hpctrain.data.verify import verify as verify_all

    report = verify_all(path, jobs=jobs or len(os.sched_getaffinity(0)))
    typer.echo(report.text())
    if json_file is not None:
        from hpctrain.metrics.jsonfiles import write_json

        write_json(json_file, report.to_record())
    raise typer.Exit(0 if report.ok else 1)


@data_app.command()
def digits(destination: Annotated[Path, typer.Argument(help="folder to be made")]) -> None:
    """Pack scikit-learn's 1,797 handwritten digits, the data of the quickstart."""
    from hpctrain.data.digits import make_digits

    typer.echo(make_digits(destination).summary())
