"""OpenSimplex noise for all cells at once, so that a world of Crafter takes 0.2 s instead of 1.5 s.

`crafter.worldgen` asks the package opensimplex for one value at a time, 40,000 for a world, in Python. The noise at a
point is the sum over the lattice points around it of

    max(0, 2 - |d|^2)^4 * gradient(lattice point) . d,    d the way from the lattice point to the point,

which numpy adds up for all cells together. In the two tetrahedra of a lattice cell the package leaves out some points
that contribute a little (up to 4e-5 of the value): so does this, and the worlds are the same.
"""

from collections.abc import Callable

import numpy as np
import opensimplex
from opensimplex.constants import GRADIENTS3, NORM_CONSTANT3, SQUISH_CONSTANT3, STRETCH_CONSTANT3
from opensimplex.internals import _init

# The noises that `crafter.worldgen` asks for, as (divisor of x, divisor of y, z).
FIELDS = (
    *((3, 3, 8), (15, 15, 3), (5, 5, 3), (15, 15, 0), (5, 5, 0), (7, 7, 6), (8, 8, 1), (6, 6, 2), (5, 5, 6)),
    *((9, 9, 4), (7, 7, 5)),
)
TUNNELS = 7, 3  # z and divisor of the noise of tunnels, at (2 x, y / 5) and at (x / 5, 2 y)

_GRADIENTS = GRADIENTS3.reshape(-1, 3).T
# The corners of a lattice cell and the points around it that lie within sqrt(2), the reach of a lattice point.
_STEPS = np.stack(np.meshgrid(*3 * [np.arange(-1, 3)], indexing="ij"), -1).reshape(-1, 3)
_STEPS = _STEPS[(_STEPS.sum(1) >= 0) & (_STEPS.sum(1) <= 3) & (np.ptp(_STEPS, axis=1) <= 2)]


class WorldNoise:
    """Stands in for `opensimplex.OpenSimplex` in `crafter.worldgen`; it computes a world's values when it is made."""

    def __init__(self, seed: int, area: tuple[int, int] = (64, 64)) -> None:
        x, y = (axis.ravel() for axis in np.meshgrid(*map(np.arange, area), indexing="ij"))
        z, size = TUNNELS
        places = [(x / a, y / b, z) for a, b, z in FIELDS]
        places += [(2 * x / size, y / 5 / size, z), (x / 5 / size, 2 * y / size, z)]
        points = np.concatenate([np.stack(np.broadcast_arrays(*place)) for place in places], axis=1)
        values = noise3(points, seed)
        exact = opensimplex.OpenSimplex(seed)
        for index in np.flatnonzero(np.abs(values) < 1e-9):  # world generation asks whether a noise is above 0
            values[index] = exact.noise3(*points[:, index])
        self._values = dict(zip(zip(*points.tolist(), strict=True), values.tolist(), strict=True))

    def noise3(self, x: float, y: float, z: float) -> float:
        """The noise at one of a world's points."""
        return self._values[x, y, z]


def noise3(points: np.ndarray, seed: int) -> np.ndarray:
    """The noise [N] of `opensimplex.OpenSimplex(seed).noise3` at `points` [3, N]."""
    permutation, gradient_index = _init(seed)
    stretched = points + points.sum(0) * STRETCH_CONSTANT3
    corner = np.floor(stretched).astype(np.int64)
    left_out = _left_out(stretched - corner)
    from_corner = points - corner - corner.sum(0) * SQUISH_CONSTANT3
    total = np.zeros(points.shape[1])
    for step in _STEPS:
        way = from_corner - (step + step.sum() * SQUISH_CONSTANT3)[:, None]
        weight = 2 - (way * way).sum(0)
        near = np.flatnonzero((weight > 0) & ~left_out(step))
        x, y, z = corner[:, near] + step[:, None]
        index = gradient_index[(permutation[(permutation[x & 255] + y) & 255] + z) & 255] // 3
        total[near] += weight[near] ** 4 * (_GRADIENTS[:, index] * way[:, near]).sum(0)
    return total / NORM_CONSTANT3


def _left_out(inside: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Which points [N] of a lattice cell get no contribution from a step; `inside` [3, N] is where they are in it.

    In the tetrahedron at (0, 0, 0) the package adds its four corners and two more points, which depend on the two
    corners that are closest; the one at (1, 1, 1) is its mirror image.
    """
    total = inside.sum(0)
    upper, tetrahedron = total >= 2, (total <= 1) | (total >= 2)
    score = np.where(upper, -inside, inside)
    order = np.argsort(-score, axis=0, kind="stable")
    best = np.take_along_axis(score, order, 0)
    first, second = order[0], order[1]
    origin_is_close = np.where(upper, total - 3, 1 - total) > best[1]
    closest = np.where((first == 1) & (second == 2) & (best[0] == best[1]), 2, first)  # of y and z, z

    def left_out(step: np.ndarray) -> np.ndarray:
        taken = []
        for point in (step, 1 - step):
            if point.min() == 0 and point.sum() <= 1:
                taken.append(np.ones_like(upper))  # a corner
                continue
            ones = point == 1
            between = np.full_like(upper, sorted(point) == [-1, 0, 1])
            taken.append(np.where(origin_is_close, between & ones[closest], ones[first] & ones[second]))
        return tetrahedron & ~np.where(upper, taken[1], taken[0])

    return left_out
