"""Start ranks of one machine under an engine's launcher, for the scripts beside this one; also two on one GPU.

python -m benchmarks.ranks --engine horovod --ranks 2 --device cuda -- bench step benchmarks/small.yaml
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.bench.command import require_writable, write_result
from hpctrain.errors import UserError
from tests.parallel.launch import LAUNCHER_OF_ENGINE, Run, launch

ROOT = Path(__file__).resolve().parents[1]
#: what is shown of the output of ranks that failed, from its end
TAIL_CHARACTERS = 4000
#: calls `hpctrain` with torch asked for algorithms that give the same bits every time
DETERMINISTIC = (
    "import torch; torch.use_deterministic_algorithms(True, warn_only=True); from hpctrain.cli import main; main()"
)


def launcher_of(engine: str, ranks: int) -> str:
    """The launcher to take; a single rank of any engine needs none."""
    return "plain" if ranks == 1 else LAUNCHER_OF_ENGINE[engine]


def missing_launcher(engine: str, ranks: int) -> str | None:
    """Why ``ranks`` ranks cannot be started under ``engine``'s launcher, or None."""
    launcher = launcher_of(engine, ranks)
    # These two are this Python's own.
    if launcher in ("plain", "torchrun") or shutil.which(launcher):
        return None
    return f"{launcher} is not on PATH"


def run(engine: str, ranks: int, device: str, command: Sequence[str], limit_s: float) -> Run:
    """``command`` on ``ranks`` ranks; on a GPU each poses as a host of its own."""
    own_host = ["bash", str(ROOT / "benchmarks/as_own_host.sh")] if device == "cuda" and ranks > 1 else []
    environ = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return launch(launcher_of(engine, ranks), ranks, [*own_host, *command], limit_s, environ)


def hpctrain(engine: str, ranks: int, device: str, argv: Sequence[str], limit_s: float, exact: bool = False) -> Run:
    """`hpctrain ARGV`; ``exact`` asks torch for deterministic algorithms."""
    program = ["-c", DETERMINISTIC] if exact else ["-m", "hpctrain"]
    return run(engine, ranks, device, [sys.executable, *program, *argv], limit_s)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the scripts that start ranks of one machine."""
    options = bare_parser(description)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--limit-s", type=float, default=600.0, help="time for all of it")
    return options


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of all scripts."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--json", type=writable, help="write the result there")
    # Asked to stop, leave by an exception, which ends the ranks too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return options


def writable(name: str) -> Path:
    """Of a result; ArgumentTypeError for a file that could not be written after all has been measured."""
    try:
        require_writable(Path(name))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(name)


def conclude(record: Mapping[str, Any], json_file: Path | None) -> int:
    """Print the record's ``sentence`` and write it; the exit status: 1 where it has a bar and has not ``passed``."""
    print(record["sentence"])
    write_result(json_file, record)
    return 0 if record.get("passed", True) else 1


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--engine", default="horovod", choices=sorted(LAUNCHER_OF_ENGINE))
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("argv", nargs="+")
    asked = options.parse_args()
    argv = [*asked.argv, *(["--json", str(asked.json)] if asked.json else [])]
    if reason := missing_launcher(asked.engine, asked.ranks):
        print(reason)
        return 1
    done = hpctrain(asked.engine, asked.ranks, asked.device, argv, asked.limit_s)
    print(done.output)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
