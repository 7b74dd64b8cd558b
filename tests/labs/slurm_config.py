"""The text of Slurm's configuration, and of the commands by which clients reach the lab's cluster and no other.

For Slurm 22.05 (Debian 12) without systemd and without control groups: processes are found by their parents, memory is watched
by polling, and `config_overrides` lets a node claim more cores and memory than the machine has.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLIENTS = (
    "sbatch",
    "scancel",
    "scontrol",
    "sinfo",
    "squeue",
    "sacct",
    "sacctmgr",
    "sprio",
    "sstat",
    "srun",
    "salloc",
    "sattach",
)
_RUN_ON = ("srun", "salloc", "sattach")  # these live as long as their job
_CLIENT_S, _JOB_S = 60, 3600


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a cluster is made of. `nodes` and `head`: name to address; `folder`: where all its files are."""

    folder: Path
    head: tuple[str, str]
    nodes: Mapping[str, str]
    gpus: int
    gpu_model: str

    @property
    def etc(self) -> Path:
        """What /etc/slurm is on every machine of the cluster."""
        return self.folder / "etc"

    @property
    def munge_socket(self) -> Path:
        """Where the one munged of the cluster listens."""
        return self.folder / "munge.socket"


def slurm_conf(cluster: Cluster) -> str:
    """slurm.conf: partitions `gpu` (all nodes, the default) and `short` (the first node, ten minutes)."""
    folder, names = cluster.folder, list(cluster.nodes)
    gres = f" Gres=gpu:{cluster.gpu_model}:{cluster.gpus}" if cluster.gpus else ""
    nodes = [
        f"NodeName={name} NodeAddr={address} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1"
        f" RealMemory=16000{gres} State=UNKNOWN"
        for name, address in cluster.nodes.items()
    ]
    settings = {
        "ClusterName": "lab",
        "SlurmctldHost": f"{cluster.head[0]}({cluster.head[1]})",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={cluster.munge_socket}",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmctldLogFile": folder.parent / "logs" / "slurmctld.log",
        "SlurmdLogFile": folder.parent / "logs" / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": 1,
        "JobAcctGatherParams": "OverMemoryKill",
        "AccountingStorageType": "accounting_storage/none",  # clients ask squeue, which remembers a job for MinJobAge
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": folder.parent / "logs" / "jobs.txt",
        "MinJobAge": 300,
        "MpiDefault": "none",
        "ReturnToService": 2,
        "JobRequeue": 0,
        "SlurmdTimeout": 10,
        "KillWait": 3,
        "InactiveLimit": 0,
        "SlurmdParameters": "config_overrides",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": 200,  # without it a job takes all of a node's memory
        "GresTypes": "gpu",
    }
    partitions = [
        "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        f"PartitionName=short Nodes={names[0]} MaxTime=10 State=UP",
    ]
    return "\n".join([*(f"{key}={value}" for key, value in settings.items()), *nodes, *partitions, ""])


def gres_conf(cluster: Cluster) -> str:
    """gres.conf: the same fake GPU files on every node, which jobs see by number in CUDA_VISIBLE_DEVICES."""
    if not cluster.gpus:
        return ""
    return f"Name=gpu Type={cluster.gpu_model} File={cluster.folder}/dev/nvidia[0-{cluster.gpus - 1}]\n"


def client_script(program: str, lab_id: str, enter: Sequence[str]) -> str:
    """A command that runs `program` against the lab's cluster, from inside the lab or from outside; never waits for ever.

    `enter` is the command that runs the rest of its line in the lab's controller.
    """
    limit = _JOB_S if Path(program).name in _RUN_ON else _CLIENT_S
    return f"""#!/bin/sh
[ "$(cat /etc/slurm/lab 2>/dev/null)" = {lab_id} ] && exec timeout --foreground {limit} {program} "$@"
exec timeout --foreground {limit} {shlex.join(enter)} env --chdir="$PWD" {program} "$@"
"""
