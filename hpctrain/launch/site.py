"""What a cluster gives and how it wants to be asked, from a site file (``slurm/sites/*.env``).

The keys and their meaning are told in ``slurm/sites/template.env``; one that is exported comes before the file's, here
as in the batch script, which sources the same file: so what else it sets (NCCL's variables, say) reaches the job.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hpctrain.errors import UserError
from hpctrain.launch.durations import seconds_of
from hpctrain.launch.envfile import Entry, read_env

PREFIX = "HPCTRAIN_"
SITE = "HPCTRAIN_SITE"
RUNS = "HPCTRAIN_RUNS"
#: of one submission, to go on in a run directory that is there
RUN_DIR = "HPCTRAIN_RUN_DIR"
_TEMPLATE = "slurm/sites/template.env tells what it means"

Count = Annotated[int, Field(ge=1)]
Memory = Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")]


def _checked_duration(text: str) -> str:
    seconds_of(text, key_of("max_time"))
    return text


Duration = Annotated[str, AfterValidator(_checked_duration)]
MpiPlugin = Annotated[str, Field(pattern=r"^(pmix(_v[0-9]+)?|none)$")]


class Site(BaseModel):
    """A site file's own keys, in small letters and without their prefix; None where the file is silent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_node: Count | None = None
    memory_per_node: Memory | None = None
    max_nodes: Count | None = None
    max_time: Duration | None = None
    gres: Literal["gres", "gpus", "none"] | None = None
    mpi: MpiPlugin = "pmix"
    engine: Literal["auto", "horovod", "mpi", "torch"] | None = None
    modules: str | None = None
    venv: str | None = None
    container: str | None = None
    scratch: str | None = None
    runs: str | None = None
    requeue: Literal["yes", "no"] = "yes"

    def need(self, field: str) -> Any:
        """The value of ``field``; UserError naming its key where the file does not give it."""
        value = getattr(self, field)
        if value is None:
            raise UserError(f"{self.path} lacks {key_of(field)}, which this submission needs: add it ({_TEMPLATE})")
        return value


def key_of(field: str) -> str:
    """How a field of ``Site`` is written in a site file."""
    return PREFIX + field.upper()


def load_site(path: Path, environ: Mapping[str, str]) -> Site:
    """The site that ``path`` and the keys in ``environ`` describe. Raises UserError naming file, line and remedy."""
    entries = read_env(path, environ)
    fields = {name: key_of(name) for name in Site.model_fields if name != "path"}
    for key, entry in entries.items():
        if key.startswith(PREFIX) and key not in fields.values():
            raise UserError(_unknown(key, entry, path, list(fields.values())))
    # A key without a value is one that is not given: so the template can be filled in where it is.
    given = {key: entry.value for key, entry in entries.items() if entry.value}
    exported = {key: environ[key] for key in fields.values() if environ.get(key)}
    values = {name: value for name, key in fields.items() if (value := exported.get(key, given.get(key)))}
    try:
        return Site(path=path, **values)  # type: ignore[arg-type]  # strings, which pydantic turns into numbers
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        key = key_of(field)
        place = "this shell" if key in exported else f"{path}:{entries[key].line}"
        raise UserError(f"{place}: {key} is {values[field]!r}, but {_required(error, field)}") from None


def _unknown(key: str, entry: Entry, path: Path, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in known], n=1)
    remedy = f"did you mean {PREFIX}{nearest[0]}?" if nearest else "slurm/sites/template.env lists those there are"
    return f"{path}:{entry.line}: {key} is an unknown key: {remedy}"


_REQUIREMENTS = {
    "memory_per_node": "must be a size as Slurm writes it, such as 500G",
    "max_time": "must be a time as Slurm writes it, such as 90 (minutes), 12:00:00 or 2-00",
    "mpi": "must be pmix, pmix_v4 or the like, or none (torch, and Horovod over Gloo): with any other each "
    "rank would start as a separate one-process MPI job",
}


def _required(error: ValidationError, field: str) -> str:
    """What ``field``, the first that pydantic found wrong, must be."""
    theirs = error.errors()[0]["msg"].replace("Input should be", "must be").replace("a valid integer", "a whole number")
    return _REQUIREMENTS.get(field, theirs.split(", unable")[0])
