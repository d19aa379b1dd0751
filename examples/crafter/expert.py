"""A script that plays Crafter: a list of rules, the first that applies. It reads the agent's text only.

It is the teacher of the traces: no person and no language model played these games. It says what it is after and acts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from .view import View

MOST = 5  # actions of one call
PLACEABLE = ("grass", "sand", "path")
STRENGTH = {"cow": 3, "zombie": 5, "skeleton": 3}
NEEDS = {"diamond": "iron_pickaxe", "iron": "stone_pickaxe", "coal": "wood_pickaxe"}
WOOD_BEFORE_TABLE = 4  # 2 for the table, 1 each for a pickaxe and a sword
RECIPES = {  # what a tool takes, in the order in which they are made
    "wood_pickaxe": ("wood",),
    "stone_pickaxe": ("wood", "stone"),
    "wood_sword": ("wood",),
    "stone_sword": ("wood", "stone"),
    "iron_pickaxe": ("wood", "coal", "iron"),
    "iron_sword": ("wood", "coal", "iron"),
}
DEEDS = ("sleep", "plant", "search", "make", "build", "turn")  # what a player says it does, when it goes to nothing


class Decision(NamedTuple):
    """What a player says, and one to five actions."""

    words: str
    actions: list[str]


def decide(text: str) -> Decision:
    """What to do next."""
    words, actions = next(_rules(View.read(text)))
    return Decision(words, actions[:MOST])


def _rules(view: View) -> Iterator[Decision]:
    """What each rule that applies wants to do, the most urgent first."""
    have, tools, done, ways, vitals = view.have, view.tools, view.done, view.ways, view.vitals
    wood, stone = have.get("wood", 0), have.get("stone", 0)
    pickaxe, stone_pickaxe = "wood_pickaxe" in tools, "stone_pickaxe" in tools
    sleep = Decision("sleep", ["sleep"] * MOST)
    if view.asleep:
        yield sleep
    for kind in ("zombie", "skeleton"):
        if kind in ways and ways[kind].steps <= 3:
            yield _attack(view, kind)
    if (vitals["drink"] <= 4 or "collect_drink" not in done) and "water" in ways:
        yield _go(view, "water", ["do"] * max(1, 9 - vitals["drink"]))
    if (vitals["food"] <= 5 or "eat_cow" not in done) and "cow" in ways:
        yield _attack(view, "cow")
    if (vitals["energy"] <= 3 or ("wake_up" not in done and vitals["energy"] < 9)) and "zombie" not in ways:
        yield sleep
    if "place_plant" not in done and view.faced == "grass":
        yield Decision("plant", ["place_plant"]) if "sapling" in have else Decision("search", ["do"] * 3)
    if view.near and (made := _make(view)):
        yield Decision("make", made)
    if "place_stone" not in done and stone and view.faced in (*PLACEABLE, "water"):
        yield Decision("build", ["place_stone"])
    for wanted, needed in NEEDS.items():
        if needed in tools and f"collect_{wanted}" not in done and wanted in ways:
            yield _go(view, wanted, ["do"])
    if pickaxe and not stone_pickaxe and stone >= 2 and wood >= 2 and "table" in ways:
        yield _go(view, "table", [])
    if not pickaxe and wood >= WOOD_BEFORE_TABLE:
        yield _build(view, ["place_table", "make_wood_pickaxe", "make_wood_sword"])
    if pickaxe and not stone_pickaxe and stone >= 2 and wood >= WOOD_BEFORE_TABLE:
        yield _build(view, ["place_table", "make_stone_pickaxe", "make_stone_sword"])
    if "place_furnace" not in done and stone_pickaxe and stone >= 4:
        yield _build(view, ["place_furnace"])
    if wood < WOOD_BEFORE_TABLE and not stone_pickaxe and "tree" in ways:
        yield _go(view, "tree", ["do"])
    if pickaxe and stone < 5 and "stone" in ways:
        yield _go(view, "stone", ["do"])
    yield _explore(view)


def _go(view: View, kind: str, then: list[str]) -> Decision:
    """Walk to the nearest of a kind, face it, and do something if the call has room for it."""
    leg = view.ways[kind]
    moves = [f"move_{leg.direction}"] * leg.steps
    return Decision(kind, moves if leg.bends else moves + then or ["noop"])


def _attack(view: View, kind: str) -> Decision:
    """Walk to a creature and hit it as often as it takes. It moves: from afar, only walk."""
    strength = 3 if "stone_sword" in view.tools else 2 if "wood_sword" in view.tools else 1
    words, actions = _go(view, kind, ["do"] * math.ceil(STRENGTH[kind] / strength))
    leg = view.ways[kind]
    return Decision(words, actions if leg.steps <= 2 or leg.bends else actions[: leg.steps - 1])


def _make(view: View) -> list[str]:
    """The tools that can be made here and now."""
    left, made = dict(view.have), []
    for name, uses in RECIPES.items():
        place = {"table", "furnace"} if "iron" in uses else {"table"}
        if name in view.tools or not place <= set(view.near) or any(left.get(item, 0) < 1 for item in uses):
            continue
        made.append(f"make_{name}")
        for item in uses:
            left[item] -= 1
    return made


def _build(view: View, actions: list[str]) -> Decision:
    """Place something on the cell in front, or turn to one where there is room."""
    if view.faced in PLACEABLE:
        return Decision("build", actions)
    return Decision("turn", [f"move_{view.open.direction}" if view.open.steps else "do"])


def _explore(view: View) -> Decision:
    """Walk on."""
    moves = [f"move_{view.open.direction}"] * view.open.steps
    return Decision("open", moves or ["do"])
