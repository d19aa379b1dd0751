"""Players who follow rules that were drawn at random: what the demo's base model is pretrained on.

Each reads the view, walks to things and acts, for no good reason: "with three stones and hungry, go to the water and
turn right". A model that learned from several of them reads and writes this language well, and plays badly.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from .expert import DEEDS, MOST, Decision
from .view import ACTIONS, NAMED, TOOLS, VITALS, View

PLAYERS = 4  # as many sets of rules; a model is told whose
LENGTH = 600  # steps of a game
ITEMS = ("sapling", "wood", "stone", "coal", "iron", "diamond")
CRAFTED = tuple(name.removeprefix("make_") for name in ACTIONS if name.endswith(TOOLS))

Test = Callable[[View], bool]


class Rule(NamedTuple):
    """Where all tests hold: go to the nearest of a kind, or stay and do a deed; then act."""

    tests: list[Test]
    words: str
    actions: list[str]


def name(player: int) -> str:
    """The system prompt of a player's conversations."""
    return f"You play Crafter as {player}."


def rules(player: int) -> list[Rule]:
    """Those of a player, the most urgent first."""
    drawn = random.Random(player)
    aims = [*NAMED, *NAMED, *DEEDS]
    drawn.shuffle(aims)
    return [
        Rule(
            [_test(drawn) for _ in range(drawn.randint(1, 2))],
            aim,
            DEEDS[aim] if aim in DEEDS else drawn.randint(1, 3) * [drawn.choice(ACTIONS)],
        )
        for aim in aims
    ]


def make(player: int) -> Callable[[str], Decision]:
    """A policy: the first rule of the player that applies, or to walk on."""
    own = rules(player)

    def decide(seen: str) -> Decision:
        view = View.read(seen)
        legs = {**dict.fromkeys(DEEDS), **view.ways}
        rule = next((one for one in own if one.words in legs and all(test(view) for test in one.tests)), None)
        leg, words, then = (legs[rule.words], rule.words, rule.actions) if rule else (view.open, "open", [])
        moves = [f"move_{leg.direction}"] * leg.steps if leg else []
        actions = moves if leg and leg.bends else [*moves, *then]
        return Decision(words, actions[:MOST] or ["noop"])

    return decide


def _test(drawn: random.Random) -> Test:
    """A question about what the player needs, has or has not, or can do for the first time."""
    vital, least, item, count = drawn.choice(VITALS), drawn.randint(3, 6), drawn.choice(ITEMS), drawn.randint(1, 5)
    tool, new = drawn.choice(CRAFTED), drawn.choice([*NAMED, *DEEDS])
    tests: list[Test] = [
        lambda view: view.vitals[vital] <= least,
        lambda view: view.have.get(item, 0) >= count,
        lambda view: view.have.get(item, 0) < count,
        lambda view: new in view.new,
        lambda view: tool in view.tools,
    ]
    return drawn.choice(tests)
