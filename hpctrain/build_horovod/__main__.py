"""Build Horovod's last release for the torch and the MPI at hand, once, and install it from a cache afterwards.

    python -m hpctrain.build_horovod [--gpu] [--cache DIR]

Horovod 0.28.1 (June 2023) neither compiles against a current torch nor starts under Open MPI 5 as released; the
few lines that change are in ``mends``. The wheel is built for the interpreter that runs this, with the compiler,
MPI and (``--gpu``) CUDA and NCCL found there, and kept in a folder named after all of these. Its version carries a
local label, so that nobody takes it for Horovod's own. Standard library only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpctrain.build_horovod.build import default_cache, install
from hpctrain.errors import HpctrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hpctrain.build_horovod", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="with NCCL, against the CUDA build of torch installed here")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where wheels are kept (%(default)s)")
    options = parser.parse_args(argv)
    try:
        install(options.gpu, options.cache)
    except HpctrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
