"""``hpctrain doctor --job`` on a terminal: the table of places with their figures, remarks, and the cost."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpctrain.doctor.suspects import sentence

if TYPE_CHECKING:
    from hpctrain.doctor.job import Preflight

_MOST_RANKS = 64


def render(found: Preflight, *, warn: bool) -> None:
    """Print ``found``; suspects only where they do not end the job (``warn``), since an error tells them else."""
    console = Console(highlight=False)
    hosts = len({place.host for place in found.places})
    ranks = f"{_counted(len(found.places), 'rank')} on {_counted(hosts, 'host')}"
    console.print(f"{ranks}, engine {found.engine}: {found.engine_reason}", markup=False)
    console.print(_table(found))
    if found.paces:
        console.print("median times of a matrix product and of a sum of 4 MiB over all ranks of one node, or of two")
    if len(found.places) > _MOST_RANKS:
        console.print(f"and {len(found.places) - _MOST_RANKS} ranks more")
    for remark in found.remarks:
        console.print(f"note: {remark}", markup=False)
    if found.suspects and warn and not any(suspect.broken for suspect in found.suspects):
        console.print(f"warning: {sentence(found.suspects)} (launch.slow_node is warn)", markup=False, soft_wrap=True)
    console.print(f"preflight took {found.cost_s:.1f} s, {found.start_s:.1f} s of it to start python and the engine")


def _table(found: Preflight) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for header in ("rank", "host", "GPU", "cores", "NUMA", "network card", "product", "sum: node", "pair"):
        table.add_column(header, justify="right" if header in ("rank", "product", "sum: node", "pair") else "left")
    for number, place in enumerate(found.places[:_MOST_RANKS]):
        pace = found.paces[number] if found.paces else None
        sums = pace.sums if pace else ()
        alone_s = [one.seconds for one in sums if len(one.hosts) == 1]
        pairs_s = [one.seconds for one in sums if len(one.hosts) > 1]
        table.add_row(
            str(place.rank),
            place.host,
            place.gpu or "–",
            spans(place.cores),
            spans(place.numa) or "–",
            place.card or "–",
            f"{pace.product_s * 1e3:.2f} ms" if pace else "–",
            *(f"{min(times) * 1e3:.2f} ms" if times else "–" for times in (alone_s, pairs_s)),
        )
    return table


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def spans(numbers: tuple[int, ...]) -> str:
    """Ascending numbers as Linux lists them: 0-3,8."""
    found = []
    for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        found.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(found)
