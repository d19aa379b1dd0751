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
NEEDS = {"diamond": "iron_pickaxe", "iron": "stone_pickaxe", "coal": "wood_pickaxe"}
WOOD = 4  # 2 for the table, 1 each for a pickaxe and a sword
DEEDS = {  # what a player says it does, when it goes to nothing, and the action
    **{name: name for name in ACTIONS if name.startswith(("make_", "place_"))},
    "collect_sapling": "do",
    "sleep": "sleep",
}


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
    have, tools, todo, ways, vitals = view.have, view.tools, view.todo, view.ways, view.vitals
    wood, stone = have.get("wood", 0), have.get("stone", 0)
    pickaxe, stone_pickaxe = "wood_pickaxe" in tools, "stone_pickaxe" in tools
    sleep = Decision("sleep", ["sleep"] * MOST)
    if view.asleep:
        yield sleep
    for kind in ("zombie", "skeleton"):
        if kind in ways and ways[kind].steps <= 3:
            yield _attack(view, kind)
    if (vitals["drink"] <= 4 or "collect_drink" in todo) and "water" in ways:
        yield _go(view, "water", ["do"] * MOST)
    if (vitals["food"] <= 5 or "eat_cow" in todo) and "cow" in ways:
        yield _attack(view, "cow")
    if (vitals["energy"] <= 3 or "wake_up" in view.now) and "zombie" not in ways:
        yield sleep
    for name, action in DEEDS.items():
        if name in view.now:
            yield Decision(name, [action] * (3 if action == "do" else 1))
    for wanted, needed in NEEDS.items():
        if needed in tools and f"collect_{wanted}" in todo and wanted in ways:
            yield _go(view, wanted, ["do"])
    if wood >= 2 and (not pickaxe or (stone >= 2 and not stone_pickaxe)):
        if "table" in ways:
            yield _go(view, "table", [])
        if pickaxe and wood >= WOOD and view.faced in PLACEABLE:
            yield Decision("place_table", ["place_table"])  # another one
    if wood < WOOD and not stone_pickaxe and "tree" in ways:
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


def _explore(view: View) -> Decision:
    """Walk on."""
    moves = [f"move_{view.open.direction}"] * view.open.steps
    return Decision("open", moves or ["do"])
