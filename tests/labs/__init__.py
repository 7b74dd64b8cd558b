"""Real servers on one machine, for tests and for users who want to see the project run against them.

* `python -m tests.labs.ssh_lab up DIR --hosts 4`: hosts with an sshd, an address, a host key and a disk each.
* `python -m tests.labs.slurm_lab up DIR --nodes 4`: a Slurm cluster with fake GPUs.
* `python -m tests.labs.docker_lab up DIR`: a Docker Engine with a registry and a base image.

Each is a context manager too (`with SshLab(folder, hosts=4) as lab:`). A lab lives in namespaces of its own, so that two run
side by side and nothing of it can outlive its processes; `docs/labs.md` says how it is built. Standard library only, and
PyYAML for the inventory.
"""

from tests.labs.errors import LabError, LabUnavailableError

__all__ = ["LabError", "LabUnavailableError"]
