"""Crafter (Hafner 2021, arXiv:2109.06780; the package `crafter`) without pictures, and the same in every process."""

import random
from types import SimpleNamespace
from typing import Any

import crafter
from crafter import worldgen

from .noise import WorldNoise
from .view import ACTIONS, DIRECTIONS, TOOLS, VITALS, View, look

LENGTH = 150  # steps of an episode; the game's own limit is 10,000


class Game(crafter.Env):  # type: ignore[misc]
    """The game with its own rules and worlds, for agents that read.

    It differs from `crafter.Env` in two things. It draws no pictures; the noise in those of the night is drawn from the
    world's random numbers, so that a night continues differently. And creatures are removed in the order in which they
    appeared: the package takes one of a set, whose order depends on addresses in memory.

    Attributes:
        total: the return: the sum of the rewards so far. A step's reward is 1 if it unlocks an achievement, and a tenth
            of the change of health.
        steps: taken in this episode.
        over: whether the player died or the episode's `length` is reached.
    """

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__(length=length)
        self.total, self.over = 0.0, False

    @property
    def steps(self) -> int:
        return int(self._step)

    @property
    def achievements(self) -> list[str]:
        """Those unlocked in this episode, by name."""
        return sorted(self._unlocked)

    def start(self, seed: int) -> str:
        """Begin the episode of a seed; return what the player sees."""
        self._seed, self._episode = seed, 0
        self.reset()
        self.total, self.over = 0.0, False
        return self.view().text()

    def endow(self, drawn: random.Random) -> str:
        """Let the player, who may have died, have, need and have done things at random; return what it sees."""
        carried = self._player.inventory
        for name in carried:
            if name in VITALS:
                carried[name] = drawn.randint(1, 9)
            elif name.endswith(TOOLS):
                carried[name] = drawn.randint(0, 1)
            else:
                carried[name] = drawn.randint(0, 1) * drawn.randint(1, 9)
        self._unlocked = {name for name in self._player.achievements if drawn.randint(0, 1)}
        self.over = self.steps >= self._length
        return self.view().text()

    def interact(self, actions: list[str]) -> str:
        """Take actions, and return what the player sees then.

        It stops before the last where the player is hurt, wakes up, or the episode ends.
        """
        for action in actions:
            if self.over:
                break
            health, asleep = self._player.health, self._player.sleeping
            _, reward, self.over, _ = self.step(ACTIONS.index(action))
            self.total += reward
            if self._player.health < health or (asleep and not self._player.sleeping):
                break
        return self.view().text()

    def view(self) -> View:
        """What the player sees."""
        player = self._player
        facing = next(name for name, way in DIRECTIONS.items() if way == tuple(player.facing))
        return look(self._cells(), player.inventory, self.achievements, facing, player.sleeping)

    def _cells(self) -> dict[tuple[int, int], str]:
        """Names of the 9 x 7 cells around the player, by their place from it; none beyond the edge of the world."""
        names = {number: name for name, number in self._sem_view._mat_ids.items()}
        names |= {number: kind.__name__.lower() for kind, number in self._sem_view._obj_ids.items()}
        seen, (x, y), (width, height) = self._sem_view(), self._player.pos, self._local_view._grid // 2
        return {
            (i, j): names[seen[x + i, y + j]]
            for i in range(-width, width + 1)
            for j in range(-height, height + 1)
            if 0 <= x + i < self._area[0] and 0 <= y + j < self._area[1]
        }

    def reset(self) -> None:
        """Make the world."""
        package = worldgen.opensimplex
        worldgen.opensimplex = SimpleNamespace(OpenSimplex=WorldNoise)
        try:
            super().reset()
        finally:
            worldgen.opensimplex = package

    def render(self, size: Any = None) -> None:
        """No picture."""

    def _balance_object(self, chunk: Any, objs: Any, *rule: Any) -> None:
        super()._balance_object(chunk, sorted(objs, key=lambda one: self._world._obj_map[tuple(one.pos)]), *rule)
