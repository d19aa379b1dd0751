"""Let players loose in worlds that nobody trained in: random actions, the base model, base and adapter, the script.

    python -m examples.crafter.play MODEL ADAPTER --games 20

Prints what each reaches in a game on average. All games of a player go on in step, so that a model answers many at
once. It sees its own last calls and their replies, as in training; where it makes no well-formed call, a step passes.
The most likely tokens are taken.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megasft.messages import quieten_libraries

from .expert import MOST, Decision
from .game import LENGTH, Game
from .traces import CALLS, TOOLS, call, make_policy, opening
from .view import ACTIONS

HELD_OUT = 300_000  # the first seed of the worlds to be tested in; traces are to be of others
PLAYERS = ("random actions", "base", "base + adapter", "script")
POLICIES = {"random actions": "random", "script": "expert"}  # of those that are no model
PROCESSES = 2  # players at a time
MOST_TOKENS = 48  # of an answer; words and a call of five actions have 30


@dataclass
class Result:
    """What a player did in one game."""

    seed: int
    total: float
    achievements: list[str]
    steps: int
    calls: int
    wellformed: int


@dataclass
class Seat:
    """A game in progress, and the conversation about it."""

    game: Game
    seed: int
    calls: int = 0
    wellformed: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # a transcript

    def begin(self) -> None:
        self.messages = opening(self.game.start(self.seed))
        self.said.append(self.messages[-1]["content"])

    def take(self, answer: str, decision: Decision | None) -> None:
        """Do what an answer says; `decision` is None where it holds no call."""
        self.calls += 1
        self.wellformed += decision is not None
        seen = self.game.interact(decision.actions if decision else ["noop"])
        if self.calls % CALLS:
            self.messages.append(call(decision) if decision else {"role": "assistant", "content": answer})
            self.messages.append({"role": "tool", "content": seen})
        else:
            self.messages = opening(seen)
        self.said += [f"-> {decision.words}: {', '.join(decision.actions)}" if decision else f"-> {answer!r}", seen]

    def result(self) -> Result:
        return Result(
            self.seed, self.game.total, self.game.achievements, self.game.steps, self.calls, self.wellformed
        )  # fmt: skip


# What the seats that still play answer: for each its text, and what it decides, or None.
Answers = Callable[[list[Seat]], list[tuple[str, Decision | None]]]


def main(
    model: Annotated[Path, typer.Argument(exists=True, help="folder of the base model")],
    adapter: Annotated[Path, typer.Argument(exists=True, help="folder of the adapter")],
    games: Annotated[int, typer.Option(min=2, help="worlds, the same for all players")] = 20,
    first_seed: Annotated[int, typer.Option(help="of the worlds")] = HELD_OUT,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the result of every game")] = None,
    show: Annotated[int | None, typer.Option(help="print the first calls of the agent's first game")] = None,
) -> None:
    """Print a table of players and what they reach."""
    console = Console()
    seeds = list(range(first_seed, first_seed + games))
    results: dict[str, list[Result]] = {}
    adapters = {"base": None, "base + adapter": adapter}
    # Spawned, as forked children of a process with threads may hang.
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        games_of = {name: pool.submit(let_play, name, model, adapters.get(name), seeds) for name in PLAYERS}
        for name, going in games_of.items():
            results[name], said, seconds = going.result()
            console.print(f"{name}: {games} games in {seconds:.0f} s", highlight=False)
            if show and name == "base + adapter":
                console.print(*said[: 2 * show], sep="\n\n", highlight=False, markup=False)
    if out is not None:
        out.write_text(json.dumps({name: [asdict(one) for one in found] for name, found in results.items()}) + "\n")
    console.print(table(results))
    console.print(rates(results))
    tuned, base, script = (average(results[name]) for name in ("base + adapter", "base", "script"))
    against = f"{tuned / base:.1f} times the base's" if base > 0 else f"the base's is {base:.2f}"
    console.print(f"The agent's return is {tuned / script:.0%} of the script's; {against}.", highlight=False)


def let_play(name: str, model: Path, adapter: Path | None, seeds: list[int]) -> tuple[list[Result], list[str], float]:
    """The results of a player's games, the transcript of the first, and the seconds that they took."""
    quieten_libraries()
    started = time.perf_counter()
    policy = POLICIES.get(name)
    seats = play(scripted(policy, seeds) if policy else language_model(model, adapter), seeds)
    return [seat.result() for seat in seats], seats[0].said, time.perf_counter() - started


def play(answers: Answers, seeds: list[int]) -> list[Seat]:
    """Play the game of each seed in step."""
    seats = [Seat(Game(), seed) for seed in seeds]
    for seat in seats:
        seat.begin()
    while playing := [seat for seat in seats if not seat.game.over]:
        for seat, (text, actions) in zip(playing, answers(playing), strict=True):
            seat.take(text, actions)
    return seats


def scripted(name: str, seeds: list[int]) -> Answers:
    """The answers of a policy without a model."""
    policies = {seed: make_policy(name, seed) for seed in seeds}
    return lambda seats: [("", policies[seat.seed](seat.messages[-1]["content"])) for seat in seats]


def language_model(model_folder: Path, adapter: Path | None) -> Answers:
    """The answers of a model: its most likely tokens, decoded together.

    The KV cache holds the conversation of each game.
    """
    import torch

    from megasft.adapters.adapter_file import AdapterFile
    from megasft.config.parallelism import TopologySettings, resolve_topology
    from megasft.data.tokenizer import load_tokenizer
    from megasft.distributed.topology import join_world
    from megasft.generation.decode import forward
    from megasft.generation.prompts import encode
    from megasft.generation.text import stop_tokens
    from megasft.job import load_model
    from megasft.model.hf_config import read_config
    from megasft.model.kv_cache import Chunk, KVCache, common_prefix

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    topology = join_world(resolve_topology(TopologySettings(), 1), seed=0)
    lora = AdapterFile(adapter).settings() if adapter else None
    model = load_model(str(model_folder), topology, torch.float32, lora, str(adapter) if adapter else None).eval()
    tokenizer = load_tokenizer(model_folder)
    stop = stop_tokens(model_folder, read_config(model_folder), tokenizer)
    cache, rows = KVCache(0), list[int]()  # rows: the seed of the game in each row of the cache

    @torch.no_grad()
    def answer(seats: list[Seat]) -> list[tuple[str, Decision | None]]:
        if not rows:
            rows.extend(seat.seed for seat in seats)
            cache.rows += [[] for _ in rows]
        seated = {seat.seed: seat for seat in seats}
        for row in reversed(range(len(rows))):
            if rows[row] not in seated:
                cache.drop(row)
                rows[row] = rows[-1]
                del rows[-1]
        chunks = []
        for row, seed in enumerate(rows):
            prompt = encode(tokenizer, seated[seed].messages, TOOLS, {})
            same = common_prefix(cache.rows[row], prompt[:-1])
            del cache.rows[row][same:]
            chunks.append(Chunk(row, prompt[same:]))
        cache.reserve(max(len(cache.rows[c.row]) + len(c.tokens) for c in chunks) + MOST_TOKENS)
        said: list[list[int]] = [[] for _ in rows]
        for _ in range(MOST_TOKENS):
            chosen = forward(model, cache, chunks, model.next_tokens)
            assert chosen is not None
            for row, token in enumerate(chosen.tolist()):
                if not (said[row] and said[row][-1] in stop):
                    said[row].append(token)
            if all(tokens[-1] in stop for tokens in said):
                break
            # A row that has ended is decoded on, and not read; what it adds to the cache is dropped in the next turn.
            chunks = [Chunk(row, [token]) for row, token in enumerate(chosen.tolist())]
        texts = {seed: tokenizer.decode([t for t in said[row] if t not in stop]) for row, seed in enumerate(rows)}
        return [(texts[seat.seed], read_decision(texts[seat.seed])) for seat in seats]

    return answer


def read_decision(answer: str) -> Decision | None:
    """An answer that is some words and one well-formed call of the tool; else None."""
    from megasft.evaluation.tool_calls import read_reply

    reply = read_reply(answer, "hermes")
    if len(reply.calls) != 1 or (found := reply.calls[0]) is None or found.name != "interact":
        return None
    actions = found.arguments.get("actions")
    if not isinstance(actions, list) or not 0 < len(actions) <= MOST or len(found.arguments) != 1:
        return None
    return Decision(reply.text, actions) if all(one in ACTIONS for one in actions) else None


def average(results: list[Result]) -> float:
    """The mean return of a game."""
    return mean(one.total for one in results)


def table(results: dict[str, list[Result]]) -> Table:
    """Returns, achievements, steps and calls of each player, as means over the games."""
    found = Table("player", *(["return", "+-", "achievements", "steps", "calls", "well-formed"]))
    for name, games in results.items():
        calls, wellformed = sum(one.calls for one in games), sum(one.wellformed for one in games)
        found.add_row(
            name,
            f"{average(games):.2f}",
            f"{stdev(one.total for one in games) / len(games) ** 0.5:.2f}",
            f"{mean(len(one.achievements) for one in games):.1f}",
            f"{mean(one.steps for one in games):.0f} of {LENGTH}",
            f"{calls / len(games):.0f}",
            f"{wellformed / calls:.1%}",
        )
    return found


def rates(results: dict[str, list[Result]]) -> Table:
    """In how many of the games each achievement was unlocked."""
    found = Table("achievement", *results)
    counts = {name: Counter(a for one in games for a in one.achievements) for name, games in results.items()}
    for achievement in sorted(set().union(*counts.values()), key=lambda one: -counts["script"][one]):
        shares = (counts[name][achievement] / len(games) for name, games in results.items())
        found.add_row(achievement, *(f"{share:.0%}" for share in shares))
    return found


if __name__ == "__main__":
    typer.run(main)
