"""What hosts need of the machine where the user is not root: user namespaces and, for daemons, ids to fill them with.

A bare user namespace knows one user, root. That does for programs, but sshd and slurmd change users and groups. The
ids for it are those that /etc/subuid and /etc/subgid grant; newuidmap and newgidmap, which unshare(1) calls, map them.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.host import HostError

#: beside root's; so many useradd grants, and the last that a distribution uses is 65534, nobody
NUM_IDS = 65536
_FIRST_ID = 100_000
_PROGRAMS = ("newuidmap", "newgidmap")
_GRANTS = (Path("/etc/subuid"), Path("/etc/subgid"))
#: of the kernel or a distribution's: name, the value that forbids, one that allows
_SETTINGS = (
    ("user.max_user_namespaces", "0", "15000"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
)


def user_namespace(*, all_ids: bool) -> list[str]:
    """Options of unshare(1): none for root, else a namespace whose root is the user, with others if ``all_ids``."""
    if os.geteuid() == 0:
        return []
    options = ["--user", "--map-root-user"]
    if all_ids:
        users, groups = granted_ids()
        # Outside, inside, how many: since util-linux 2.39 there is a newer form, too.
        options += [f"--map-users={users},1,{NUM_IDS}", f"--map-groups={groups},1,{NUM_IDS}"]
    return options


def granted_ids(grants: Sequence[Path] = _GRANTS) -> list[int]:
    """Where a range of ``NUM_IDS`` ids begins in each file. HostError says what to install, or what to write where."""
    if missing := [name for name in _PROGRAMS if not shutil.which(name)]:
        raise HostError(f"{', '.join(missing)} not found: install the package uidmap, or be root")
    owners = (user_name(), str(os.geteuid()))
    ranges = [_ranges(path) for path in grants]
    mine = [[first for owner, first, count in rows if owner in owners and count >= NUM_IDS] for rows in ranges]
    if lacking := [str(path) for path, firsts in zip(grants, mine, strict=True) if not firsts]:
        free = max([_FIRST_ID, *(first + count for rows in ranges for _, first, count in rows)])
        raise HostError(
            f"{owners[0]} has no range of {NUM_IDS} ids, which Slurm's daemons need: "
            f"add the line {owners[0]}:{free}:{NUM_IDS} to {' and '.join(lacking)}, or be root"
        )
    return [firsts[0] for firsts in mine]


def user_name() -> str:
    """Of the effective user; its number where it has no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def why_forbidden(settings: Path = Path("/proc/sys")) -> str:
    """What keeps this user from user namespaces, and the remedy."""
    paths = {name: settings / name.replace(".", "/") for name, _, _ in _SETTINGS}
    remedies = [
        f"{name}={allows}"
        for name, forbids, allows in _SETTINGS
        if paths[name].exists() and paths[name].read_text().strip() == forbids
    ]
    reason = f"set {' and '.join(remedies)} by sysctl" if remedies else "a container or a security module forbids them"
    return f"no user namespaces for {user_name()}: {reason}, or be root"


def _ranges(path: Path) -> list[tuple[str, int, int]]:
    """Owner, first id and number of ids of each line."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.split(":") for line in lines if line.count(":") == 2]
    return [(owner, int(first), int(count)) for owner, first, count in rows]
