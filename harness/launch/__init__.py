"""Starts the processes of an experiment anywhere, and never leaves one behind.

    from harness.launch import Http, Launch, Over, Role
    server = Role("server", ("serve", "--port", "{port.http}"), Over(host), ports=("http",), ready=Http("http"))
    client = Role("client", ("ask", "http://{server.http}"), needs=("server",), lasts=False)
    with Launch([server, client], folder) as launch:
        launch.wait("client")

Places: `Here` (this machine), `Over` (a host of an inventory, over SSH), `Contained` (a container in one of these) and `Step`
(`srun` in the Slurm job that this process is in). At all of them a role is held on a leash (`far/leash.py`): a small program
beside it that chooses its ports, sees that it is ready, sends what it prints and makes, and ends it with everything below it
when it is told to, when this process ends (by SIGKILL too), or when the network to here is cut.
"""

from harness.launch.errors import LaunchError, RoleDiedError, RoleLateError, RoleLostError
from harness.launch.launch import Launch
from harness.launch.places import Contained, Here, Over, Place, Step, allocated_nodes
from harness.launch.roles import File, Http, LogLine, Probe, Role, Tcp

__all__ = [
    "Contained",
    "File",
    "Here",
    "Http",
    "Launch",
    "LaunchError",
    "LogLine",
    "Over",
    "Place",
    "Probe",
    "Role",
    "RoleDiedError",
    "RoleLateError",
    "RoleLostError",
    "Step",
    "Tcp",
    "allocated_nodes",
]
