"""The command line: what can be typed, and nothing of how it is done. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hpctrain import __version__
from hpctrain.errors import HpctrainError, UserError

app = typer.Typer(
    name="hpctrain",
    help="Train image classifiers on many GPUs, and measure how well it scaled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(name="data", help="Prepare and check data sets.", no_args_is_help=True)
bench_app = typer.Typer(name="bench", help="Measure, verify, and leave a JSON file.", no_args_is_help=True)
app.add_typer(data_app)
app.add_typer(bench_app)

ConfigPath = Annotated[Path, typer.Argument(help="YAML recipe, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change one key, as in train.epochs=5; repeatable"),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result there as JSON")]
Rounds = Annotated[int, typer.Option(min=1, help="blocks of log.every_steps batches that each competitor runs")]


@contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Around heavy imports: there Ctrl-C may come out as any error of a library, with its traceback."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="auto: newest complete checkpoint of the run directory")
    ] = "auto",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="default: runs/<config>-<time>")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Train as CONFIG says, on all ranks the launcher started.

    One rank: `hpctrain train …`; more: `horovodrun -np N hpctrain train …`, or the same behind mpirun, srun
    or torchrun.
    """
    from hpctrain.config.load import load_config

    settings = load_config(config, overrides or [])
    with _ended_by_interrupt():
        from hpctrain.train.main import print_plan, train_command

    if dry_run:
        print_plan(settings)
    else:
        train_command(settings, config.stem, resume=resume, run_dir=run_dir)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory, or one of its checkpoints")],
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Exact top-1 and top-5 of a checkpoint on its whole validation part."""
    with _ended_by_interrupt():
        from hpctrain.train.main import eval_command

    eval_command(run, overrides or [], json_file)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Tell what each engine and loader needs and has; exit 0 when `auto` would work."""
    from hpctrain.doctor import examine, render, to_json

    report = examine()
    typer.echo(to_json(report)) if as_json else render(report)
    raise typer.Exit(report.exit_code)


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
    import json

    from hpctrain.data.verify import verify as verify_all

    report = verify_all(path, jobs=jobs or len(os.sched_getaffinity(0)))
    typer.echo(report.text())
    if json_file is not None:
        from hpctrain.metrics.jsonfiles import write_atomic

        write_atomic(json_file, json.dumps(report.to_record(), indent=2).encode() + b"\n")
    raise typer.Exit(0 if report.ok else 1)


@data_app.command()
def digits(destination: Annotated[Path, typer.Argument(help="folder to be made")]) -> None:
    """Pack scikit-learn's 1,797 handwritten digits, the data of the quickstart."""
    from hpctrain.data.digits import make_digits

    typer.echo(make_digits(destination).summary())


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
    with _ended_by_interrupt():
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
    with _ended_by_interrupt():
        from hpctrain.bench.command import bench_data_command

    bench_data_command(config, overrides or [], rounds, json_file)


@bench_app.command("comm")
def bench_comm(
    config: Annotated[
        Path | None, typer.Argument(help="YAML recipe; of it comm, train.device and seed count (default: none)")
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
    with _ended_by_interrupt():
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
        typer.Argument(help="YAML recipe; of it model, data.image_size, gradients and comm count"),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="net whose tensors count; without CONFIG resnet50")
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
    with _ended_by_interrupt():
        from hpctrain.bench.gradients.command import Asked, bench_gradients_command

    bench_gradients_command(config, overrides or [], model, Asked(ranks, rounds, json_file, picture, tune))


def main() -> None:
    """Run the command line; user errors become one sentence and exit status 2."""
    # Torch's C++ part would add stack traces of its own to our messages when a peer is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()
    except HpctrainError as error:
        from hpctrain.topology.voice import report_early

        sys.exit(report_early(error, os.environ))


if __name__ == "__main__":
    main()
