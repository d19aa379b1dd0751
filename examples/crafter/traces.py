"""Games as conversations: a system prompt, the tool, what the player sees, calls and replies.

    python -m examples.crafter.traces --policy expert --seeds 0 300 --out traces.jsonl

The agent's context holds `CALLS` calls. Then a new conversation begins with what the player sees, so that one game is
several conversations, and none grows beyond the window of a small model. `metadata` names the seed of the game and the
conversation's number in it.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from . import aimless, expert
from .expert import Decision
from .game import LENGTH, Game
from .view import ACTIONS, View

CALLS = 4  # of one conversation
SLIPS = 1, 6  # the fewest and the most calls between two conversations of a careless player
DRAWS = 8  # of what an aimless player has and needs, to choose from
SYSTEM = "You play Crafter. Stay alive and unlock achievements."
INTERACT = {
    "type": "function",
    "function": {
        "name": "interact",
        "description": "Take up to 5 actions, then see.",
        "parameters": {
            "type": "object",
            "properties": {
                "actions": {
                    "type": "array",
                    "items": {"type": "string", "enum": list(ACTIONS)},
                    "minItems": 1,
                    "maxItems": expert.MOST,
                }
            },
            "required": ["actions"],
        },
    },
}
TOOLS: list[Any] = [INTERACT]

Message = dict[str, Any]
Policy = Callable[[str], Decision]


def main(
    policy: Annotated[str, typer.Option(help="expert, careless, aimless or random")] = "expert",
    seeds: Annotated[tuple[int, int], typer.Option(help="first seed, and the one after the last")] = (0, 300),
    out: Annotated[Path, typer.Option(help="the JSONL file to write")] = Path("traces.jsonl"),
    processes: Annotated[int, typer.Option(help="games are played side by side")] = 2,
) -> None:
    """Play a game for each seed and write its conversations, a line each."""
    played = write(out, policy, range(*seeds), processes)
    # What an aimless player has done is drawn anew after each call: its return says nothing.
    returned = "" if policy == "aimless" else f", mean return {played.mean_return:.2f}"
    typer.echo(f"{out}: {played.conversations:,} conversations{returned}")


@dataclass(frozen=True)
class Played:
    """What was written."""

    conversations: int
    calls: int
    mean_return: float
    mean_achievements: float


def write(out: Path, policy: str, seeds: Sequence[int], processes: int = 2) -> Played:
    """Play a game for each seed, side by side, and write the conversations of all, in the order of the seeds."""
    conversations, calls, returns, unlocked = 0, 0, [], []
    # Spawned, as forked children of a process with threads may hang.
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        out.open("w", encoding="utf-8") as file,
    ):
        for records, total, achievements in pool.map(record, seeds, len(seeds) * [policy], chunksize=4):
            file.writelines(json.dumps(one) + "\n" for one in records)
            conversations += len(records)
            calls += sum(message["role"] == "assistant" for one in records for message in one["messages"])
            returns.append(total)
            unlocked.append(achievements)
    return Played(conversations, calls, mean(returns), mean(unlocked))


def record(seed: int, policy: str) -> tuple[list[dict[str, Any]], float, int]:
    """The conversations of the game of a seed, its return, and the number of its achievements."""
    no_aim, careless = policy == "aimless", policy == "careless"
    game = _game(aimless.LENGTH if no_aim else LENGTH)
    records: list[dict[str, Any]] = [
        {"messages": messages, "tools": TOOLS, "metadata": {"seed": seed, "part": part, "policy": policy}}
        for part, messages in enumerate(play(game, seed, make_policy(policy, seed), endowed=no_aim, careless=careless))
    ]
    if no_aim:  # whose rules these are
        for one in records:
            one["messages"][0]["content"] = aimless.name(seed % aimless.PLAYERS)
    return records, game.total, len(game.achievements)


@cache
def _game(length: int) -> Game:
    """One of this process: its textures take longer to load than a game to play."""
    return Game(length)


def play(
    game: Game, seed: int, policy: Policy, endowed: bool = False, careless: bool = False
) -> Iterator[list[Message]]:
    """Play the game of a seed; yield its conversations.

    `endowed`: after each call the player has and needs other things, drawn at random, and is alive. So a few games show
    all that there is to read, and an answer is rarely the one before: left alone, 85 % of an aimless player's are, and
    a model that learns from them learns to repeat, not to read. Of `DRAWS` draws the one is taken that has the player
    say what it said least, so that it says everything about equally often.

    `careless`: between two conversations the player does what any rule of the script says that applies, as often as
    `SLIPS` allows, and this is in no conversation. So the script is seen to answer where it would not have come: an
    imitator, which errs, comes there (DART: Laskey et al. 2017, arXiv:1703.09327).
    """
    drawn, said = random.Random(seed), Counter[str]()

    def shown(seen: str) -> str:
        if not endowed:
            return seen
        draws = [drawn.random() for _ in range(DRAWS)]
        seen = game.endow(random.Random(min(draws, key=lambda one: said[policy(game.endow(random.Random(one))).words])))
        said[policy(seen).words] += 1
        return seen

    seen = shown(game.start(seed))
    while not game.over:
        messages = opening(seen)
        for number in range(CALLS):
            decision = policy(seen)
            messages.append(call(decision))
            seen = shown(game.interact(decision.actions))
            if game.over or number == CALLS - 1:
                break
            messages.append({"role": "tool", "content": seen})
        yield messages
        for _ in range(drawn.randint(*SLIPS) if careless else 0):
            seen = game.interact(drawn.choice(expert.rules(View.read(seen))).actions)


def make_policy(name: str, seed: int) -> Policy:
    """The script; one of the aimless players, by the seed; or one that does one to five things at random."""
    if name in ("expert", "careless"):
        return expert.decide
    if name == "aimless":
        return aimless.make(seed % aimless.PLAYERS)
    if name != "random":
        raise ValueError(f"{name}: no such policy; there are expert, careless, aimless and random")
    drawn = random.Random(seed)

    def decide(seen: str) -> Decision:
        view = View.read(seen)
        words = drawn.choice(["open", *view.ways])
        return Decision(words, [drawn.choice(ACTIONS) for _ in range(drawn.randint(1, expert.MOST))])

    return decide


def opening(seen: str) -> list[Message]:
    """The messages that begin a conversation."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": seen}]


def call(decision: Decision) -> Message:
    """The assistant's message that says something and calls the tool."""
    function = {"name": "interact", "arguments": {"actions": decision.actions}}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": decision.words, "tool_calls": calls}


if __name__ == "__main__":
    typer.run(main)
