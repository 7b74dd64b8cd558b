"""Local slopes from the answers so far: which move looks best?

Pure Python, so that the same history gives the same ranking anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

LATTICE = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Parts of a step that a move may take along each knob."""
PENALTY = 10.0
"""What a unit of margin beyond a limit costs in units of ln(objective), when moves are ranked."""
RIDGE = 0.05
"""Weight of the prior against one point one step away."""


Vector = tuple[float, ...]


@lru_cache(maxsize=1024)  # a replayed history asks the same again
def promising_moves(
    points: tuple[Vector, ...], gains: Vector, walls: tuple[tuple[float, Vector], ...], step: float
) -> tuple[Vector, ...]:
    """The moves from the origin that a linear model likes, best first.

    Args:
        points: known points, relative to the origin.
        gains: rise of ln(objective) from the origin to each of them.
        walls: for each limit, the margin at the origin and its rises to the points.
        step: the longest move along any axis.
    """
    uphill = _slopes(points, gains, step)
    fences = [(now, _slopes(points, rises, step)) for now, rises in walls]
    start = max((now for now, _ in walls), default=0.0)

    def merit(move: Vector) -> float:
        margin = max((now + _dot(slope, move) for now, slope in fences), default=0.0)
        return round(_dot(uphill, move) - PENALTY * (max(margin, 0.0) - max(start, 0.0)), 9)

    moves = itertools.product([step * part for part in LATTICE], repeat=len(points[0]))
    rated = [(merit(move), move) for move in moves]
    return tuple(move for value, move in sorted(rated, key=lambda at: -at[0]) if value > 0)


def _slopes(points: Sequence[Vector], rises: Sequence[float], step: float) -> list[float]:
    """Local slopes; an axis not yet explored is given its share of the steepness seen along the diagonal."""
    along = [sum(p) for p in points]
    square = sum(d * d for d in along)
    return slopes(points, rises, step, sum(d * r for d, r in zip(along, rises, strict=True)) / square if square else 0.0)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slopes(points: Sequence[Sequence[float]], rises: Sequence[float], step: float, prior: float) -> list[float]:
    """Gradient at the origin of a quantity that rises by `rises` at `points` (relative to the origin).

    By weighted ridge regression: points count less the more steps away they are; `prior` is the
    slope along every axis before anything is known.
    """
    size = len(points[0])
    matrix = [[RIDGE * step * step if i == j else 0.0 for j in range(size)] for i in range(size)]
    right = [0.0] * size
    for point, rise in zip(points, rises, strict=True):
        weight = (1 + sum(x * x for x in point) / step**2) ** -2
        left = rise - prior * sum(point)
        for i, x in enumerate(point):
            right[i] += weight * x * left
            for j, y in enumerate(point):
                matrix[i][j] += weight * x * y
    return [prior + b for b in solve(matrix, right)]


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small positive-definite system by elimination, in place."""
    size = len(right)
    for k in range(size):
        for i in range(k + 1, size):
            factor = matrix[i][k] / matrix[k][k]
            right[i] -= factor * right[k]
            for j in range(k, size):
                matrix[i][j] -= factor * matrix[k][j]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(matrix[i][j] * right[j] for j in range(i + 1, size))) / matrix[i][i]
    return right
