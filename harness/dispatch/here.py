"""Whether there is anywhere to go at all. Cheap, as most inventories are of one machine."""

from __future__ import annotations

from pathlib import Path

import yaml

DEFAULT = Path("hosts/local.yaml")


def only_here(inventory: Path) -> bool:
    """Whether the file `inventory` is of this machine alone, without a container; of a file that is wrong, no."""
    if not inventory.exists():
        return inventory == DEFAULT
    try:
        told = yaml.load(inventory.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return set(told) == {"hosts"} and all(host == {"name": host["name"], "local": True} for host in told["hosts"])
    except (yaml.YAMLError, KeyError, TypeError, OSError):
        return False  # whoever reads it in earnest says what is wrong
