"""A script that plays Crafter: a list of rules, the first that applies. It reads the agent's text only.

It is the teacher of the traces: no person and no language model played these games. It says what it is after and acts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from .view import ACTIONS, View

MOST = 5  # actions of one call
PLACEABLE = ("grass", "sand", "path")
STRENGTH = {"cow": 3, "zombie": 5, "skeleton": 3}
WOOD = 4  # 2 for the table, 1 each for a pickaxe and a sword
DEEDS = {  # what a player says it does when it goes to nothing, and its actions
    **{name: [name] for name in ACTIONS if name.startswith(("make_", "place_"))},
    "collect_sapling": ["do"] * 3,
    "sleep": ["sleep"] * MOST,
}
ON_THE_SPOT = {"water": MOST, "table": 0}  # how often to `do` something with a thing; else once


class Decision(NamedTuple):
    """What a player says, and one to five actions."""

    words: str
    actions: list[str]


def decide(text: str) -> Decision:
    """What to do next."""
    return rules(View.read(text))[0]


def rules(view: View) -> list[Decision]:
    """What each rule that applies wants to do, the most urgent first."""
    return [Decision(words, actions[:MOST]) for words, actions in _rules(view)]


def _rules(view: View) -> Iterator[Decision]:
    have, tools, ways, vitals = view.have, view.tools, view.ways, view.vitals
    wood, stone = have.get("wood", 0), have.get("stone", 0)
    pickaxe, stone_pickaxe = "wood_pickaxe" in tools, "stone_pickaxe" in tools
    sleep = Decision("sleep", DEEDS["sleep"])
    if view.asleep:
        yield sleep
    for kind in ("zombie", "skeleton"):
        if kind in ways and ways[kind].steps <= 3:
            yield _attack(view, kind)
    if vitals["drink"] <= 4 and "water" in ways:
        yield _go(view, "water")
    if vitals["food"] <= 5 and "cow" in ways:
        yield _attack(view, "cow")
    if vitals["energy"] <= 3 and "zombie" not in ways:
        yield sleep
    for name in view.new:
        if name in STRENGTH:
            yield _attack(view, name)
        elif name in ways:
            yield _go(view, name)
        elif name != "sleep" or "zombie" not in ways:
            yield Decision(name, DEEDS[name])
    if pickaxe and not stone_pickaxe and wood >= WOOD and stone >= 2 and view.faced in PLACEABLE:
        yield Decision("place_table", DEEDS["place_table"])  # another one
    if wood < WOOD and not stone_pickaxe and "tree" in ways:
        yield _go(view, "tree")
    if pickaxe and stone < 5 and "stone" in ways:
        yield _go(view, "stone")
    yield _explore(view)


def _go(view: View, kind: str, times: int | None = None) -> Decision:
    """Walk to the nearest of a kind, face it, and act on it if the call has room for it."""
    leg = view.ways[kind]
    moves = [f"move_{leg.direction}"] * leg.steps
    deeds = ["do"] * (ON_THE_SPOT.get(kind, 1) if times is None else times)
    return Decision(kind, moves if leg.bends else moves + deeds or ["noop"])


def _attack(view: View, kind: str) -> Decision:
    """Walk to a creature and hit it as often as it takes. It moves: from afar, only walk."""
    strength = 3 if "stone_sword" in view.tools else 2 if "wood_sword" in view.tools else 1
    words, actions = _go(view, kind, math.ceil(STRENGTH[kind] / strength))
    leg = view.ways[kind]
    return Decision(words, actions if leg.steps <= 2 or leg.bends else actions[: leg.steps - 1])


def _explore(view: View) -> Decision:
    """Walk on."""
    moves = [f"move_{view.open.direction}"] * view.open.steps
    return Decision("open", moves or ["do"])
