"""`hpctrain bench …`: measure, verify, and leave a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpctrain.cli.options import ConfigPath, JsonFile, Overrides, ended_by_interrupt

bench_app = typer.Typer(name="bench", help="Measure, verify, and leave a JSON file.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, help="blocks of log.every_steps batches that each competitor runs")]


@bench_app.command("step")
def bench_step(
    config: ConfigPath,
    overrides: Overrides = None,
    json_file: JsonFile = None,
    rounds: Rounds = 12,
) -> None:
    """Compare the training step with a bare torch loop and with Horovod's own optimizer, interleaved.

    On the ranks of this job, with synthetic pictures: `horovodrun -np 2 hpctrain bench step …`.
    """
    with ended_by_interrupt():
        from hpctrain.bench.command import bench_step_command

    bench_step_command(config, overrides or [], rounds, json_file)


@bench_app.command("data")
def bench_data(
    config: ConfigPath,
    overrides: Overrides = None,
    json_file: JsonFile = None,
    rounds: Rounds = 12,
) -> None:
    """Images/s of each loader alone, on the same windows, interleaved. One process, without a launcher."""
    with ended_by_interrupt():
        from hpctrain.bench.command import bench_data_command

    bench_data_command(config, overrides or [], rounds, json_file)


@bench_app.command("comm")
def bench_comm(
    config: Annotated[
        Path | None, typer.Argument(help="YAML recipe; only its comm, train.device and seed are used (default: none)")
    ] = None,
    overrides: Overrides = None,
    # Not --min and --max: horovodrun takes them for beginnings of its own options, even behind the command.
    smallest: Annotated[str, typer.Option("--min-size", metavar="SIZE", help="smallest message")] = "8B",
    largest: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="largest message")] = "128MiB",
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="NAME", help="of sums: fp32, fp16, bf16; repeatable (default: fp32 and fp16)"),
    ] = None,
    json_file: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="blocks of each operation at each size")] = 12,
) -> None:
    """Latency and bandwidth of the engine's operations and of each gradient reduction, by message size.

    On the ranks of this job: `horovodrun -np 2 hpctrain bench comm`. Every result is checked before it is timed;
    a wrong one ends with exit status 1. algbw = size / time. busbw = algbw x 2(N-1)/N for all_reduce, x (N-1)/N for
    reduce_scatter, all_gather and all_to_all, x 1 for broadcast, on N ranks, as NVIDIA's nccl-tests define it
    (doc/PERFORMANCE.md there). Sizes are those of a rank's whole buffer.
    """
    with ended_by_interrupt():
        from hpctrain.bench.comm.command import bench_comm_command

    bench_comm_command(
        config,
        overrides or [],
        smallest=smallest,
        largest=largest,
        dtypes=dtypes or ["fp32", "fp16"],
        rounds=rounds,
        json_file=json_file,
    )


@bench_app.command("gradients")
def bench_gradients(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML recipe; only its model, data.image_size, gradients and comm are used"),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", help="model whose gradient shapes are exchanged (default: CONFIG's, or resnet50)"
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes of each competitor on this host; 2, or a launcher's")
    ] = None,
    json_file: JsonFile = None,
    rounds: Rounds = 12,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="draw the times as a PNG")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="try bucket sizes and write the best beside the JSON")] = False,
) -> None:
    """Compare our whole exchange of a model's gradients with Horovod's, DDP's, plain mpi4py and ChainerMN's way.

    Started plainly: it starts the ranks of every competitor itself, as many as a launcher around it would have. Each
    is verified before it is timed, only one runs at a time, and ratios (a peer's time / ours) are taken within rounds.
    """
    with ended_by_interrupt():
        from hpctrain.bench.gradients.command import Asked, bench_gradients_command

    bench_gradients_command(config, overrides or [], model, Asked(ranks, rounds, json_file, picture, tune))
