"""A real Slurm cluster with fake GPUs on one machine.

    python -m tests.labs.slurm_lab up DIR --nodes 4 --gpus 2
    python -m tests.labs.slurm_lab exec DIR -- srun --gres=gpu:1 env
    eval "$(python -m tests.labs.slurm_lab env DIR)"; sinfo          # this shell's commands now mean this cluster
    python -m tests.labs.slurm_lab kill-node DIR node02       (drain, resume, cut, join ...: see --help)
    python -m tests.labs.slurm_lab down DIR

    with SlurmLab(folder, nodes=4) as lab:
        subprocess.run(["sbatch", "job.sh"], env={**os.environ, **lab.env})

Every node is a machine of its own (address, host name, processes); munged and slurmctld run on the machine `head`. With
`--ssh` (class `SshSlurmLab`) every machine has an sshd too.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tests.labs import netns, packages, processes, slurm_config
from tests.labs.errors import LabError
from tests.labs.faults import FaultyFarm
from tests.labs.machines import HEAD
from tests.labs.slurm_config import Cluster
from tests.labs.ssh_lab import SshLab

_ETC = Path("/etc/slurm")  # inside a job the plugin of Snakemake drops SLURM_CONF, so the configuration must be here


class SlurmLab(FaultyFarm):
    """A cluster of `nodes` nodes, each with `gpus` fake GPUs; partitions `gpu` (default) and `short`."""

    kind: ClassVar[str] = "slurm"
    head: ClassVar[bool] = True
    shares_home: ClassVar[bool] = True
    packages: ClassVar[Mapping[str, str]] = {
        "slurmctld": "slurmctld",
        "slurmd": "slurmd",
        "sbatch": "slurm-client",
        "munged": "munge",
    }

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        nodes: int = 4,
        gpus: int = 2,
        gpu_model: str = "h200",
        **options: Any,
    ) -> None:
        """A cluster that is not up yet; `options` are those of `Farm` (but `hosts`).

        Raises:
            LabError: more nodes or GPUs than such a lab has addresses and files for.
        """
        if not 0 <= gpus <= 16:
            raise LabError("use at most 16 GPUs in each node")
        if options.get("jump"):
            raise LabError("a cluster's machines are not behind a jump host")
        options.pop("hosts", None)  # the register's name for `nodes`
        super().__init__(folder, hosts=nodes, nodes=nodes, gpus=gpus, gpu_model=gpu_model, **options)
        addresses = {name: self.machines[name].address for name in self.nodes}
        self.cluster = Cluster(self.folder / "slurm", (HEAD, self.machines[HEAD].address), addresses, gpus, gpu_model)

    @property
    def env(self) -> dict[str, str]:
        """Variables under which `sbatch`, `squeue` ... of any process on this machine mean this cluster and no other."""
        path = f"{self.cluster.folder / 'bin'}:{os.environ.get('PATH', os.defpath)}"
        return {"PATH": path, "SLURM_CONF": str(self.cluster.etc / "slurm.conf")}

    @property
    def environment(self) -> dict[str, str]:
        """Variables that client commands in the controller need."""
        return self.env

    @property
    def binds(self) -> Mapping[str, Path]:
        """Every machine has the cluster's /etc/slurm."""
        return {**super().binds, str(_ETC): self.cluster.etc}

    # -- what an operator does, and what goes wrong beyond `FaultyFarm` ----------------------------------------------------

    def state_of(self, node: int | str) -> str:
        """What Slurm says of a node: `idle`, `allocated`, `draining`, `drained`, `down*` ..."""
        return self.run(["sinfo", "-h", "-n", self.name_of(node), "-p", "gpu", "-o", "%T"]).stdout.strip()

    def drain(self, node: int | str) -> None:
        """No new jobs on this node; the ones on it end in peace."""
        self._update(node, "drain")

    def kill_node(self, node: int | str) -> None:
        """It loses power, and Slurm is told (left to itself it notices half a minute later, see `power_off`)."""
        self.power_off(node)
        self._update(node, "down")

    def expire(self, job: str) -> None:
        """A running job's time is up now instead of at its limit; Slurm ends it at its next look, within half a minute."""
        self.run(["scontrol", "update", f"jobid={job}", "EndTime=now+1"])

    def hurry(self, job: str) -> None:
        """Start a job now that Slurm put back into the queue, which it would let wait for two minutes."""
        self.run(["scontrol", "update", f"jobid={job}", "StartTime=now"])

    def resume(self, node: int | str) -> None:
        """Back to work, whatever was done to it: boots it if it is off; returns when it is idle or has jobs."""
        name = self.name_of(node)
        if self.is_on(name):
            self.join(name)
        else:
            self.boot(name)
        if self.state_of(name).startswith(("drain", "down")):
            self.run(["scontrol", "update", f"nodename={name}", "state=resume"], check=False)  # it may come back by itself
        self._until_up([name], 60)

    def stop_controller(self) -> None:
        """End slurmctld, which notes what it knows: clients wait and fail, running jobs run on."""
        room = self.rooms[HEAD]
        daemon = int(room.see("/run/slurmctld.pid").read_text())
        room.run(["kill", f"-{signal.SIGTERM.value}", str(daemon)])
        processes.wait_for(lambda: room.ended(daemon), "end of slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld with the jobs and nodes that it knew."""
        self.rooms[HEAD].run([packages.find("slurmctld") or "slurmctld"])
        # by its port, since a client that comes too early waits a second before it tries again
        processes.wait_for(lambda: netns.answers(self.controller.init.pid, self.machines[HEAD].address, 6817), "slurmctld")

    def _update(self, node: int | str, state: str) -> None:
        self.run(["scontrol", "update", f"nodename={self.name_of(node)}", f"state={state}", "reason=lab"])

    # -- coming up ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.keep(self.cluster.folder)
        for name in ("etc", "state", "dev", "munge", "bin", *(f"spool-{node}" for node in self.nodes)):
            (self.cluster.folder / name).mkdir(parents=True, exist_ok=True)
        (self.cluster.folder / "munge").chmod(0o700)
        _secret(self.cluster.folder / "munge" / "key")
        (self.cluster.etc / "lab").write_text(self.id)
        (self.cluster.etc / "slurm.conf").write_text(slurm_config.slurm_conf(self.cluster))
        (self.cluster.etc / "gres.conf").write_text(slurm_config.gres_conf(self.cluster))
        for number in range(self.cluster.gpus):
            os.mknod(self.cluster.folder / "dev" / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        _ETC.mkdir(exist_ok=True)
        super()._start()

    def _serve(self, names: Sequence[str]) -> None:
        super()._serve(names)
        if HEAD in names:
            self._write_clients()
            self._start_munged()
            self.start_controller()
        nodes = [name for name in names if name in self.nodes]
        for name in nodes:
            self.rooms[name].run([packages.find("slurmd") or "slurmd", "-N", name])
        self._until_up(nodes, 30)

    def _start_munged(self) -> None:
        own = self.cluster.folder / "munge"
        options = {"key-file": own / "key", "socket": self.cluster.munge_socket, "log-file": self.logs / "munged.log"}
        options |= {"pid-file": Path("/run/munged.pid"), "seed-file": own / "seed"}
        self.rooms[HEAD].run([packages.find("munged") or "munged", "--force", *(f"--{k}={v}" for k, v in options.items())])

    def _until_up(self, nodes: Sequence[str], timeout_s: float) -> None:
        def up() -> bool:
            said = self.run(["sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T"], check=False).stdout.split("\n")
            state = dict(line.split() for line in said if line)
            return all(state.get(name) in ("idle", "mixed", "allocated") for name in nodes)

        processes.wait_for(up, f"{', '.join(nodes)} ready for jobs", timeout_s, every_s=0.05)

    def _write_clients(self) -> None:
        enter = ["nsenter", f"--target={self.controller.init.pid}", "--net", "--mount", "--uts", "--"]
        for name in slurm_config.CLIENTS:
            if program := packages.find(name):
                script = self.cluster.folder / "bin" / name
                script.write_text(slurm_config.client_script(program, self.id, enter))
                script.chmod(0o755)


class SshSlurmLab(SlurmLab, SshLab):
    """A cluster whose machines, the head too, are the hosts of an SSH lab as well."""

    kind: ClassVar[str] = "slurm+ssh"
    packages: ClassVar[Mapping[str, str]] = {**SlurmLab.packages, **SshLab.packages}


def _secret(path: Path) -> None:
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(1024))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    from tests.labs import cli

    faults = (
        "drain",
        "resume",
        "kill_node",
        "cut",
        "join",
        "kill",
        "power_off",
        "boot",
        "hang",
        "thaw",
        "fill_disk",
        "free_disk",
    )
    return cli.main((SlurmLab, SshSlurmLab), argv, faults, _options)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=4, help="how many (4)")
    parser.add_argument("--gpus", type=int, default=2, help="fake GPUs of each node (2)")
    parser.add_argument("--gpu-model", default="h200", help="what Slurm calls them (h200)")
    parser.add_argument(
        "--ssh", dest="kind", action="store_const", const=SshSlurmLab.kind, help="every machine has an sshd too"
    )


if __name__ == "__main__":
    sys.exit(main())
