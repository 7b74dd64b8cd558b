"""SSH keys, and the text of sshd's configuration."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.labs import processes


def new_key(path: Path, comment: str) -> str:
    """Make a key pair at `path`, replacing one that is there; gives its public half as `ssh-ed25519 AAAA...`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    processes.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path])
    return public_key(path)


def public_key(path: Path) -> str:
    """The public half of the key pair at `path`, without its comment."""
    kind, encoded, *_ = path.with_name(f"{path.name}.pub").read_text().split()
    return f"{kind} {encoded}"


def sshd_config(folder: Path) -> str:
    """For an sshd whose host key `key` and `authorized_keys` lie in `folder`; keys only, root may log in.

    `python3` of its sessions is the Python that this process' own comes from.
    """
    return f"""\
Port 22
HostKey {folder}/key
PidFile /run/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
Subsystem sftp internal-sftp
SetEnv PATH={sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
MaxStartups 100:30:200
MaxSessions 100
"""
