"""What can be done to the machines of a farm while others use them."""

from __future__ import annotations

import os
import signal

from tests.labs import machines, processes
from tests.labs.errors import LabError
from tests.labs.farm import Farm

_PAGE = 4096


class FaultyFarm(Farm):
    """A farm whose machines can be cut off, killed, frozen and filled. A machine is named, or counted from 0."""

    def cut(self, host: int | str) -> None:
        """Pull its cable: packets vanish, nobody is told."""
        self._links(host, "down")

    def join(self, host: int | str) -> None:
        """Plug the cable in again."""
        self._links(host, "up")

    def kill(self, host: int | str) -> None:
        """Every process on it dies at once; its peers see their connections end. Its disk stays."""
        name = self.name_of(host)
        self.rooms[name].close()
        for plug in self.machines[name].plugs:  # the kernel takes a moment to remove it: it must be gone when `boot` comes
            self.controller.run(["ip", "link", "delete", plug.link], check=False)

    def power_off(self, host: int | str) -> None:
        """Like `kill`, but its peers are not told: to them it is silent."""
        self.cut(host)
        self.kill(host)

    def boot(self, host: int | str) -> None:
        """Start a machine that was killed, with the disk that it had."""
        name = self.name_of(host)
        if self.is_on(name):
            raise LabError(f"{name} is on already")
        self._boot([name])
        self.record()

    def hang(self, host: int | str) -> None:
        """Freeze every process on it: the kernel goes on accepting connections, and nothing ever answers."""
        self._signal(host, signal.SIGSTOP)

    def thaw(self, host: int | str) -> None:
        """Let a frozen machine run on."""
        self._signal(host, signal.SIGCONT)

    def fill_disk(self, host: int | str, free_bytes: int = 0) -> None:
        """Leave `free_bytes` on its disk, in whole pages of 4 KiB (one at least on an empty disk); writers meet ENOSPC."""

        def filled() -> bool:  # not when the host has meanwhile written more than was used
            disk = os.statvfs(self.disk(host))
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            return self._resize(host, str(max(used + free_bytes, _PAGE)))

        processes.wait_for(filled, f"full disk of {self.name_of(host)}")

    def free_disk(self, host: int | str) -> None:
        """Give it the disk size back that it began with."""
        if not self._resize(host, f"{self._disk_mib}m"):
            raise LabError(f"{self.name_of(host)}: its disk holds more than {self._disk_mib} MiB")

    def _resize(self, host: int | str, size: str) -> bool:
        target = machines.disk(self.folder, self.name_of(host))
        return self.controller.run(["mount", "-o", f"remount,size={size}", target], check=False).returncode == 0

    def _links(self, host: int | str, state: str) -> None:
        name = self.name_of(host)
        if not self.is_on(name):
            raise LabError(f"{name} is off: boot it first")
        for plug in self.machines[name].plugs:
            self.controller.run(["ip", "link", "set", plug.link, state])

    def _signal(self, host: int | str, number: int) -> None:
        room = self.rooms[self.name_of(host)]
        for member in processes.members(processes.mounts_of(room.init.pid)):
            if member != room.init:  # it holds the leash
                member.signal(number)
