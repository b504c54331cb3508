"""The files under /etc that make hosts a Slurm cluster: slurm.conf, keys of munge and ssh. Written before hosts boot.

Intervals are as short as Slurm takes them, so that a test waits seconds for what takes minutes on a real cluster.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: as the job scripts of a site would count them; several share each core of this machine
CORES_PER_TASK = 4
#: a node that has been silent for so long is down, and its jobs are requeued
NODE_TIMEOUT_S = 15
#: between SIGTERM and SIGKILL
KILL_WAIT_S = 5
#: so long ago a job must have ended for its processes on a node that comes back to be ended at once, not a minute later
MESSAGE_TIMEOUT_S = 5
_MEMORY_MIB = 4096

_SLURM_CONF = """\
ClusterName=hpctrain
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
# Also how long a requeued job is held.
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={log}/slurmctld.log
SlurmdLogFile={log}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
# The node has what is written here, whatever the machine has.
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout={node_timeout_s}
KillWait={kill_wait_s}
MessageTimeout={message_timeout_s}
TCPTimeout=2
GresTypes=gpu
AccountingStorageType={storage}
AccountingStorageHost=head
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
NodeName={nodes} CPUs={cores} RealMemory={memory_mib} {gres}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO
"""

_SLURMDBD_CONF = """\
DbdHost=head
SlurmUser=root
AuthType=auth/munge
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
LogFile={log}/slurmdbd.log
PidFile=/run/slurm/slurmdbd.pid
"""

_SSH_CONFIG = """\
IdentityFile /etc/ssh/cluster_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""

_SSHD_CONFIG = """\
HostKey /etc/ssh/cluster_key
AuthorizedKeysFile /etc/ssh/cluster_key.pub
PidFile /run/sshd.pid
PermitRootLogin yes
# It would not trust a key below /, which is nobody's in a user namespace.
StrictModes no
MaxStartups 100
SetEnv {environment}
"""


@dataclass(frozen=True)
class Settings:
    num_nodes: int
    tasks_per_node: int
    #: per node; a name each, without a device
    gpus: int
    accounting: bool

    @property
    def nodes(self) -> str:
        return f"n[1-{self.num_nodes}]"


def write_etc(shared: Path, settings: Settings, ssh_environment: Mapping[str, str]) -> None:
    """Fill ``shared``/etc and make ``shared``/log; ``ssh_environment`` is what commands by ssh find set."""
    etc, log = shared / "etc", shared / "log"
    log.mkdir()
    for folder in ("slurm", "munge", "ssh"):
        (etc / folder).mkdir(parents=True)
    _write(etc / "munge/munge.key", os.urandom(128))
    _write_slurm(etc / "slurm", shared, settings)
    key = etc / "ssh/cluster_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", str(key)], check=True)
    # No password fits, and yet the account is not locked: it is when sshd cannot read the machine's file.
    _write(etc / "shadow", "root:*:1::::::\n")
    _write(etc / "ssh/ssh_config", _SSH_CONFIG)
    pairs = " ".join(f'"{name}={value}"' for name, value in ssh_environment.items())
    _write(etc / "ssh/sshd_config", _SSHD_CONFIG.format(environment=pairs))


def _write_slurm(etc: Path, shared: Path, settings: Settings) -> None:
    conf = _SLURM_CONF.format(
        log=shared / "log",
        node_timeout_s=NODE_TIMEOUT_S,
        kill_wait_s=KILL_WAIT_S,
        message_timeout_s=MESSAGE_TIMEOUT_S,
        storage="accounting_storage/slurmdbd" if settings.accounting else "accounting_storage/none",
        nodes=settings.nodes,
        cores=settings.tasks_per_node * CORES_PER_TASK,
        memory_mib=_MEMORY_MIB,
        gres=f"Gres=gpu:{settings.gpus}" if settings.gpus else "",
    )
    _write(etc / "slurm.conf", conf, mode=0o644)
    # slurmd asks for a plugin, though nothing here is confined by one.
    _write(etc / "cgroup.conf", "CgroupPlugin=cgroup/v1\n", mode=0o644)
    _write(etc / "slurmdbd.conf", _SLURMDBD_CONF.format(log=shared / "log"))
    if settings.gpus:
        # Without files a node's GPUs are invalid; the number in the name is what CUDA_VISIBLE_DEVICES gets.
        (shared / "gpu").mkdir()
        for number in range(settings.gpus):
            (shared / f"gpu/fake{number}").symlink_to("/dev/null")
        files = f"{shared}/gpu/fake[0-{settings.gpus - 1}]"
        _write(etc / "gres.conf", f"NodeName={settings.nodes} Name=gpu File={files}\n", mode=0o644)


def _write(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
