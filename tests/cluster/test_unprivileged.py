"""Users other than root: where the machine does not give them what hosts or Slurm need, they are told what that is.

Those users are made here, in user namespaces, whoever runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.host import HostError
from tests.cluster.unprivileged import NUM_IDS, granted_ids, user_name, user_namespace, why_forbidden

ROOT = Path(__file__).resolve().parents[2]
#: of nobody on any machine, hence without a grant
STRANGER = 54321
OBSTACLES = "from tests.cluster.slurm import obstacle, slurm_obstacle; print(obstacle(), slurm_obstacle(), sep='\\n')"
FORBID = "echo 0 >/proc/sys/user/max_user_namespaces; "

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is PATH, with newuidmap and newgidmap in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("newuidmap", "newgidmap"):
        (folder / name).touch(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def grants(tmp_path: Path) -> list[Path]:
    """In the place of /etc/subuid and /etc/subgid, for which somebody else is known; the second one is missing."""
    (tmp_path / "subuid").write_text(f"# ours\nsomebody:100000:65536\n{user_name()}:900000:1000\n")
    return [tmp_path / "subuid", tmp_path / "subgid"]


def obstacles_of_a_stranger(prepare: str = "") -> list[str]:
    """What hinders hosts, and what Slurm, for one who is not root, after a shell with root's rights ran ``prepare``."""
    as_stranger = ["unshare", "--user", f"--map-user={STRANGER}", f"--map-group={STRANGER}", "--keep-caps", "sh", "-c"]
    if subprocess.run([*as_stranger, "unshare --user --map-root-user true"]).returncode:
        pytest.skip("user namespaces are forbidden here")
    command = [*as_stranger, f'{prepare}exec "$@"', "sh", sys.executable, "-c", OBSTACLES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() or [done.stderr]


def test_a_user_without_ids_has_hosts_but_no_slurm() -> None:
    hosts, slurm = obstacles_of_a_stranger()
    assert hosts == "None"
    # Where uidmap is not installed, that comes first.
    assert re.search(rf"install the package uidmap, or be root|add the line {STRANGER}:\d+:65536 to /etc/subuid", slurm)


def test_where_user_namespaces_are_forbidden_there_are_no_hosts() -> None:
    hosts, slurm = obstacles_of_a_stranger(FORBID)
    assert hosts == slurm
    assert hosts.startswith("host head does not come up: unshare: ")
    assert hosts.endswith(
        f"(no user namespaces for {STRANGER}: set user.max_user_namespaces=15000 by sysctl, or be root)"
    )


def test_what_forbids_user_namespaces(tmp_path: Path) -> None:
    who = f"no user namespaces for {user_name()}"
    assert why_forbidden(tmp_path) == f"{who}: a container or a security module forbids them, or be root"
    for name, value in (("user/max_user_namespaces", "1000"), ("kernel/apparmor_restrict_unprivileged_userns", "1")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{value}\n")
    assert why_forbidden(tmp_path) == f"{who}: set kernel.apparmor_restrict_unprivileged_userns=0 by sysctl, or be root"
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("0\n")
    assert "set kernel.unprivileged_userns_clone=1 and kernel.apparmor" in why_forbidden(tmp_path)


def test_ids_without_the_programs_that_map_them(programs: Path, grants: list[Path]) -> None:
    (programs / "newgidmap").unlink()
    with pytest.raises(HostError, match=r"^newgidmap not found: install the package uidmap, or be root$"):
        granted_ids(grants)


@pytest.mark.usefixtures("programs")
def test_ids_that_are_not_granted(grants: list[Path]) -> None:
    user, (users, groups) = user_name(), grants
    line = f"{user}:901000:{NUM_IDS}"
    complaint = f"{user} has no range of {NUM_IDS} ids, which Slurm's daemons need: add the line {line} to "
    with pytest.raises(HostError, match=f"^{complaint}{users} and {groups}, or be root$"):
        granted_ids(grants)
    users.write_text(f"{users.read_text()}{line}\n")
    with pytest.raises(HostError, match=f"add the line {user}:966536:65536 to {groups}, or be root$"):
        granted_ids(grants)
    groups.write_text(f"{os.geteuid()}:200000:{NUM_IDS}\n")
    assert granted_ids(grants) == [901000, 200000]


def test_options_of_unshare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert user_namespace(all_ids=True) == []
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert user_namespace(all_ids=False) == ["--user", "--map-root-user"]
