"""How a run is taken up again: the line to type, and what an error says of it.

Another start goes on only in the run directory of the one before; without a name it would make a new one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TrainCommand:
    """`hpctrain train` as it was typed: the configuration and the changes to it."""

    config: Path
    overrides: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What runs of this configuration are called."""
        return self.config.stem

    def to_continue(self, run_dir: Path, environ: Mapping[str, str] = os.environ) -> str:
        """How to go on in ``run_dir``: the whole line but for the launcher before it; in a Slurm job, which is
        submitted by another line, what to put before that."""
        where = in_run_dir(run_dir, environ)
        if "SLURM_JOB_ID" in environ:
            return f"to continue, where the job is not requeued: {where} before the same sbatch or hpctrain submit line"
        sets = [word for override in self.overrides for word in ("--set", override)]
        return f"to continue: {shlex.join(['hpctrain', 'train', str(self.config), *sets])} {where}"


def in_run_dir(run_dir: Path, environ: Mapping[str, str] = os.environ) -> str:
    """What makes another start go on in ``run_dir``: an option of `hpctrain train`, or a variable of job scripts."""
    directory = shlex.quote(str(run_dir))
    return f"HPCTRAIN_RUN_DIR={directory}" if "SLURM_JOB_ID" in environ else f"--run-dir {directory}"
