"""What the player sees, as a few lines of text.

    health-9 food-8 drink-8 energy-9
    have wood-3 stone-1 wood_pickaxe wood_sword
    new place_stone collect_sapling water
    facing-grass near-table
    open-up-3 tree-left-1 water-left-3+ cow-right-2

`new` is what unlocks an achievement that this game has not seen: deeds that are possible at the place, then things in
sight that the player has the tools for.

The player sees 9 x 7 cells, as in the game's own picture. Of each kind of thing in it that can be walked to, the text
names the nearest, and the first leg of the shortest way to it: `cow-right-2` is two steps to the right, the last of
them into the cow, where a step only turns the player to face it. After `water-left-3+` the way bends. `here` is what
the player faces. `open` is where to walk on: straight ahead, at an obstacle to the side with more room, and for how
many cells. A fact is one word, so that a tokenizer that learned from such text makes one token of it.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from crafter import constants

Cell = tuple[int, int]

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WALKABLE = ("grass", "sand", "path")
VITALS = ("health", "food", "drink", "energy")
TOOLS = ("_pickaxe", "_sword")
ACTIONS = tuple(constants.actions)
CREATURES = {"cow": "eat_cow", "zombie": "defeat_zombie", "skeleton": "defeat_skeleton"}
NAMED = ("zombie", "skeleton", "cow", "water", "tree", "stone", "coal", "iron", "diamond", "table", "furnace")
WORKPLACES = ("table", "furnace")
AROUND = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]  # where the game looks for a table


class Leg(NamedTuple):
    """Steps in one direction; `bends` says that the way continues in another. No steps: the player faces it."""

    direction: str
    steps: int
    bends: bool = False

    def text(self) -> str:
        """`left-3`, `left-3+` or `here`."""
        return f"{self.direction}-{self.steps}{'+' if self.bends else ''}" if self.steps else "here"

    @classmethod
    def read(cls, text: str) -> "Leg":
        """The leg that `text` wrote."""
        if text == "here":
            return cls("", 0)
        direction, steps = text.rstrip("+").split("-")
        return cls(direction, int(steps), text.endswith("+"))


HERE = Leg("", 0)


@dataclass(frozen=True)
class View:
    """A view in parts. `text` writes it, and `View.read` reads it back.

    Attributes:
        vitals: health, food, drink and energy, 0 to 9.
        have: what the player carries, and how many.
        tools: pickaxes and swords.
        new: deeds and kinds of things that unlock an achievement of which this game has none yet.
        faced: the name of what the player faces.
        near: those of table and furnace that are near enough to work at.
        open: where to walk on; no steps where the player is shut in.
        ways: the beginning of the way to the nearest of each kind.
    """

    vitals: Mapping[str, int]
    have: Mapping[str, int]
    tools: Sequence[str]
    new: Sequence[str]
    faced: str
    near: Sequence[str] = ()
    open: Leg = HERE
    ways: Mapping[str, Leg] = field(default_factory=dict)
    asleep: bool = False

    def text(self) -> str:
        """The lines that an agent reads."""
        vitals = [f"{name}-{count}" for name, count in self.vitals.items()]
        have = [f"{name}-{count}" for name, count in self.have.items()] + list(self.tools)
        place = [f"facing-{self.faced}", *(f"near-{kind}" for kind in self.near)]
        ways = [f"open-{self.open.text()}", *(f"{kind}-{leg.text()}" for kind, leg in self.ways.items())]
        lines = [" ".join([*vitals, *(["asleep"] if self.asleep else [])])]
        lines += [" ".join(["have", *have])] if have else []
        lines += [" ".join(["new", *self.new])] if self.new else []
        return "\n".join([*lines, " ".join(place), " ".join(ways)])

    @classmethod
    def read(cls, text: str) -> "View":
        """The view that `text` wrote."""
        first, *rest = (line.split() for line in text.split("\n"))
        lists = {words[0]: words[1:] for words in rest if words[0] in ("have", "new")}
        facts = [word for words in rest if words[0] not in lists for word in words]
        named = {word.partition("-")[0]: word.partition("-")[2] for word in facts if not word.startswith("near-")}
        carried = [word for word in lists.get("have", []) if not word.endswith(TOOLS)]
        return cls(
            vitals=_counts(word for word in first if word != "asleep"),
            have=_counts(carried),
            tools=[word for word in lists.get("have", []) if word.endswith(TOOLS)],
            new=lists.get("new", []),
            faced=named["facing"],
            near=[word.removeprefix("near-") for word in facts if word.startswith("near-")],
            open=Leg.read(named["open"]),
            ways={kind: Leg.read(named[kind]) for kind in NAMED if kind in named},
            asleep="asleep" in first,
        )


def look(
    cells: Mapping[Cell, str], inventory: Mapping[str, int], done: Sequence[str], facing: str, asleep: bool
) -> View:
    """The view of a player at (0, 0), from the names of the cells around and the achievements unlocked."""
    carried = {name: count for name, count in inventory.items() if count and name not in VITALS}
    faced = cells.get(DIRECTIONS[facing], "edge")
    near = [kind for kind in WORKPLACES if any(cells.get(cell) == kind for cell in AROUND)]
    ways = _ways(tuple(cells.items()), facing)
    offers = [*_deeds(inventory, faced, near), *_things(inventory, near, ways)]
    return View(
        vitals={name: inventory[name] for name in VITALS},
        have={name: count for name, count in carried.items() if not name.endswith(TOOLS)},
        tools=[name for name in carried if name.endswith(TOOLS)],
        new=list(dict.fromkeys(name for name, achievement in offers if achievement not in done and not asleep)),
        faced=faced,
        near=near,
        open=_open(cells, facing),
        ways=ways,
        asleep=asleep,
    )


def _has(inventory: Mapping[str, int], uses: Mapping[str, int]) -> bool:
    return all(inventory.get(item, 0) >= count for item, count in uses.items())


def _deeds(inventory: Mapping[str, int], faced: str, near: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What the game allows at the place, and the achievement it is."""
    for name, rule in constants.make.items():
        if set(rule["nearby"]) <= set(near) and _has(inventory, rule["uses"]):
            yield f"make_{name}", f"make_{name}"
    for name, rule in constants.place.items():
        if faced in rule["where"] and _has(inventory, rule["uses"]):
            yield f"place_{name}", f"place_{name}"
    if faced == "grass":
        yield "collect_sapling", "collect_sapling"
    if inventory["energy"] < constants.items["energy"]["max"]:  # whoever is rested does not fall asleep
        yield "sleep", "wake_up"


def _things(inventory: Mapping[str, int], near: Sequence[str], ways: Mapping[str, Leg]) -> Iterator[tuple[str, str]]:
    """What to eat, to defeat, to collect with the tools at hand, or to make something at, and the achievement it is."""
    for kind in ways:
        if kind in CREATURES:
            yield kind, CREATURES[kind]
        if (found := constants.collect.get(kind)) and _has(inventory, found["require"]):
            yield kind, f"collect_{next(iter(found['receive']))}"
        for name, rule in constants.make.items():
            if kind not in near and set(rule["nearby"]) <= {*near, kind} and _has(inventory, rule["uses"]):
                yield kind, f"make_{name}"


def _open(cells: Mapping[Cell, str], facing: str) -> Leg:
    """Straight ahead; at an obstacle to the side that has more room, or back."""
    free = {name: _free(cells, step) for name, step in DIRECTIONS.items()}
    if free[facing]:
        return Leg(facing, free[facing])
    sides = ("up", "down") if facing in ("left", "right") else ("left", "right")
    way = max(sides, key=lambda side: free[side])
    way = way if free[way] else max(free, key=lambda side: free[side])
    return Leg(way, free[way])


def _free(cells: Mapping[Cell, str], step: Cell) -> int:
    count = 0
    while cells.get(((count + 1) * step[0], (count + 1) * step[1])) in WALKABLE:
        count += 1
    return count


@lru_cache(maxsize=1)  # often asked for again with other belongings
def _ways(seen: tuple[tuple[Cell, str], ...], facing: str) -> Mapping[str, Leg]:
    """The beginning of the way to the nearest of each kind: the fewest steps, then the fewest bends."""
    cells = dict(seen)
    order = [facing, *(name for name in DIRECTIONS if name != facing)]
    found: dict[str, tuple[int, int, Leg]] = {}
    reached: set[tuple[Cell, str]] = set()
    # (steps, bends, number, cell, direction of the last step, first leg); of equal ones what was reached earlier
    queue: list[tuple[int, int, int, Cell, str, Leg]] = [(0, 0, 0, (0, 0), "", Leg("", 0))]
    number = 0
    while queue:
        steps, bends, _, (x, y), last, leg = heapq.heappop(queue)
        for name in order:
            cell = x + DIRECTIONS[name][0], y + DIRECTIONS[name][1]
            kind = cells.get(cell)
            if kind is None or (cell, name) in reached or cell == (0, 0):
                continue
            straight = name == last
            first = leg._replace(bends=True)
            if not last or (straight and not leg.bends):
                first = Leg(name, steps + 1)
            cost = steps + 1, bends + (bool(last) and not straight)
            if kind in WALKABLE:
                reached.add((cell, name))
                number += 1
                heapq.heappush(queue, (*cost, number, cell, name, first))
            elif kind in NAMED and (kind not in found or cost < found[kind][:2]):
                found[kind] = (*cost, Leg("", 0) if cost[0] == 1 and name == facing else first)
    return {kind: found[kind][2] for kind in NAMED if kind in found}


def _counts(words: Iterable[str]) -> dict[str, int]:
    return {name: int(count) for name, _, count in (word.partition("-") for word in words)}
