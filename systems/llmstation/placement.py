"""Who runs where, as data (sheet 2.8).

*Tensor parallel*: every GPU runs both tasks, each split over all GPUs. *Split*: one part of the GPUs serves, the other
tunes (the paper's 70B panels); when one part no longer carries the load, serving spills over to the tuning part, and
tuning yields there.
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Group:
    """GPUs (by index) that hold one tensor-parallel copy of the model, and the tasks that run on them."""

    gpus: tuple[int, ...]
    serves: bool
    tunes: bool

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return len(self.gpus)


@dataclass(frozen=True, slots=True)
class Placement:
    """Disjoint groups that cover the testbed."""

    name: str
    groups: tuple[Group, ...]

    @property
    def serving(self) -> tuple[Group, ...]:
        """Groups that serve, in the order in which they take load."""
        return tuple(group for group in self.groups if group.serves)

    @property
    def tuning(self) -> tuple[Group, ...]:
        """Groups that tune."""
        return tuple(group for group in self.groups if group.tunes)


def placement(name: str, gpus: int) -> Placement:
    """The placement `name` (`tensor-parallel` or `split`) of `gpus` GPUs.

    Raises:
        InputError: unknown name, or a split of an odd number of GPUs.
    """
    every = tuple(range(gpus))
    if name == "tensor-parallel":
        return Placement(name, (Group(every, serves=True, tunes=True),))
    if name == "split":
        if gpus < 2 or gpus % 2:
            raise InputError("placement", "gpus", gpus, "a split placement needs an even number of GPUs")
        half = gpus // 2
        return Placement(name, (Group(every[:half], True, False), Group(every[half:], True, True)))
    raise InputError("placement", "placement", name, "use tensor-parallel or split")
