"""Kill ranks of a tiny job at random moments, repeatedly, and compare its results with those of an uninterrupted run.

    python -m tests.faults.kills --kills 40 --seed 0

The same command restarts each run until it is complete. After every kill, all checkpoints must verify, and the newest
one must not be older than before. At the end, adapters, optimizer states and metrics must be bitwise those of the
uninterrupted run.
"""

import argparse
import functools
import importlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megasft.train.checkpoint.folder import Checkpoints, damage
from tests.parallel.resume import lines, tensors
from tests.support.forked import Command
from tests.support.world import make_world

STEPS = 8
TOPOLOGIES = {"TP=2": {"tensor": 2}, "DP=2": {"data": 2}}
SETTINGS = ("lora.dropout=0.2", "checkpoint.keep=2", "training.validation.eval_steps=3")

# --- the moments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A call before, after or (for a generator) within which to kill; `test` receives the call's arguments."""

    owner: str
    name: str
    when: str
    first_rank_only: bool = True
    test: Callable[..., bool] = lambda *_: True


def _named(beginning: str) -> Callable[..., bool]:
    return lambda path, *_: path.name.startswith(beginning)


def _renaming(old: str, new: str) -> Callable[..., bool]:
    return lambda path, target: path.name.startswith(old) and Path(target).name.startswith(new)


def _around(owner: str, name: str, *rest: Any) -> list[Point]:
    return [Point(owner, name, "before", *rest), Point(owner, name, "after", *rest)]


CHECKPOINT, CACHE, TRAINER, PATH = (
    "megasft.train.checkpoint.folder:",
    "megasft.data.token_cache:",
    "megasft.train.trainer:",
    "pathlib:Path",
)
MOMENTS: dict[str, list[Point]] = {
    "data preparation": [
        *_around("megasft.job:", "prepare"), *_around(CACHE, "_make"), Point(CACHE, "_unchanged", "within"),
        *_around(PATH, "rename", True, lambda path, _: path.name.endswith(".part") and "step" not in path.name),
    ],
    "loading": [
        *_around("megasft.train.checkpoint.resume:", "find", False), *_around("megasft.train.checkpoint.optimizer_shards:OptimizerShards", "load", False),
        Point("megasft.train.checkpoint.optimizer_shards:SavedShards", "fill", "after", False), *_around("megasft.train.metrics:Metrics", "__init__"),
        *_around("megasft.train.checkpoint.resume:", "_set_aside"),
    ],
    "step": [
        *_around(TRAINER + "Trainer", "_compute", False), *_around(TRAINER, "step", False),
        *_around(TRAINER + "Trainer", "train_step", False),
    ],
    "metrics": [*_around("megasft.train.metrics:Metrics", "_write"), Point("megasft.train.metrics:Metrics", "_write", "half")],
    "validation": [
        *_around(TRAINER + "Trainer", "validate", False), *_around(TRAINER + "Trainer", "evaluate", False),
        *_around(PATH, "rename", True, lambda path, target: "best" in path.name + Path(target).name),
    ],
    "copying and writing states": [
        *_around("megasft.train.checkpoint.optimizer_shards:OptimizerShards", "copy", False), *_around("megasft.train.checkpoint.optimizer_shards:OptimizerShards", "write", False),
        Point("megasft.train.checkpoint.optimizer_shards:", "_runs", "within", False), *_around(CHECKPOINT + "Checkpoints", "begin"),
    ],
    "writing the checkpoint's adapter": _around("megasft.train.checkpoint.async_writer:CheckpointWriter", "_write_adapter"),
    "manifest": [
        *_around(CHECKPOINT, "write_text", True, _named("manifest")), *_around(CHECKPOINT, "write_text", True, _named("state")),
    ],
    "rename": [
        *_around(PATH, "rename", True, _renaming(".step-", "step-")), *_around(PATH, "rename", True, _renaming(".latest", "latest")),
        *_around(PATH, "symlink_to", True, _named(".latest")),
    ],
    "pruning": [
        *_around(PATH, "rename", True, _renaming("step-", ".step-")),
        *_around(CHECKPOINT + "Checkpoints", "prune"),
    ],
    "writing the final adapter": [
        *_around(PATH, "rename", True, lambda path, target: "adapter" in path.name + Path(target).name),
        Point(TRAINER + "Trainer", "save", "after", False, lambda _, folder: Path(folder).name == "adapter"),
    ],
}  # fmt: skip
ANY_TIME = "any time"
# How often these come up in an attempt, about; others some three times.
OFTEN = {"step": 7, "metrics": 10, "data preparation": 1, "loading": 1, "writing the final adapter": 1}


def arm(moment: str, place: int, nth: int, victim: int, everyone: bool) -> None:
    """In a rank: at the nth call of a moment's point, kill rank `victim`, or all ranks and the launcher at once."""
    if os.environ["RANK"] != str(victim):
        return
    point = MOMENTS[moment][place]
    module, _, member = point.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, member) if member else owner
    original = getattr(owner, point.name)
    calls = 0

    def die() -> None:
        os.killpg(0, signal.SIGKILL) if everyone else os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += point.test(*args)
        now = calls == nth and point.test(*args)
        if now and point.when == "half":
            metrics, line = args
            os.write(metrics._file.fileno(), line[: len(line) // 2].encode())
        if now and point.when in ("before", "half"):
            die()
        result = original(*args, **kwargs)
        if now and point.when == "after":
            die()
        return _dying_within(result, die) if now and point.when == "within" else result

    setattr(owner, point.name, wrapped)


def _dying_within(items: Iterator[Any], die: Callable[[], None]) -> Iterator[Any]:
    for i, item in enumerate(items):
        yield item
        if i == 1:
            die()
    die()


# --- runs ------------------------------------------------------------------------------------------------------------


class Killed:
    """A tiny job under a topology, with one uninterrupted run."""

    def __init__(self, folder: Path, topology: str) -> None:
        self.folder = folder / topology
        self.folder.mkdir(parents=True)
        self.run_file = make_world(self.folder, **TOPOLOGIES[topology], steps=STEPS)
        self.whole = self.folder / "whole"
        started = time.monotonic()
        assert self._start(self.whole, "cache").wait() == 0
        self.seconds = time.monotonic() - started

    def _start(self, run: Path, cache: str, *fault: Any) -> Command:
        own = (f"job.output_dir='{run}'", f"data.cache_dir='{self.folder / cache}'")
        overrides = [argument for setting in (*SETTINGS, *own) for argument in ("--set", setting)]
        arguments = ["train", "--config", str(self.run_file), *overrides]
        return Command(arguments, run.with_suffix(".err"), in_rank=arm if fault else None, args=fault)

    def run(self, name: str, chance: random.Random, kills: int, moments: list[str]) -> Counter[str]:
        """One run, killed up to so many times: how often at which moment. Raises AssertionError if it lost anything."""
        survived: Counter[str] = Counter()
        run, cache, newest = self.folder / name, "cache", 0
        while True:
            moment = chance.choice(moments) if survived.total() < kills else ""
            if moment == "data preparation":
                cache = f"cache-{name}-{survived.total()}"
            command, words = self._attempt(run, cache, moment, chance)
            code = command.wait()
            words = f"{name}, {moment or 'in peace'} {words}"
            newest = self._check(run, newest, words)
            if code == 0:
                self._compare(run, words)
                return survived
            assert "Traceback" not in command.said(), f"{words}: {command.said()}"
            assert moment, f"{words} ends with {code}: {command.said()}"
            assert code in (1, -signal.SIGKILL), f"{words} ends with {code}: {command.said()}"
            survived[moment] += 1

    def _attempt(self, run: Path, cache: str, moment: str, chance: random.Random) -> tuple[Command, str]:
        victim = chance.choice([0, 1, None])  # None: all
        if not moment:
            return self._start(run, cache), ""
        if moment == ANY_TIME:
            command, seconds = self._start(run, cache), chance.uniform(0, self.seconds)
            ended = time.monotonic() + seconds
            while time.monotonic() < ended and command.alive():
                time.sleep(0.01)
            command.kill(victim)
            return command, f"after {seconds:.2f} s, rank {victim}"
        place, nth = chance.randrange(len(MOMENTS[moment])), chance.randint(1, OFTEN.get(moment, 3))
        point = MOMENTS[moment][place]
        rank = 0 if point.first_rank_only else victim or 0
        words = f"({point.when} call {nth} of {point.owner}{point.name}, rank {rank}{' and all' * (victim is None)})"
        return self._start(run, cache, moment, place, nth, rank, victim is None), words

    def _check(self, run: Path, newest: int, words: str) -> int:
        """Verify every checkpoint against its manifest; return the newest one's step, which must not be before `newest`."""
        checkpoints = Checkpoints(run / "checkpoints")
        steps = [int(folder.name.removeprefix("step-")) for folder in checkpoints.all()]
        for folder in checkpoints.all():
            assert damage(folder) is None, f"{words}: {folder}: {damage(folder)}"
        assert max(steps, default=0) >= newest, f"{words}: step {newest} was there, now {steps}"
        latest = checkpoints.folder / "latest"
        assert not latest.is_symlink() or latest.exists(), f"{words}: {latest} leads nowhere"
        return max(steps, default=0)

    def _compare(self, run: Path, words: str) -> None:
        whole, got = ([line for line in lines(one) if line["kind"] != "event"] for one in (self.whole, run))
        assert whole == got, f"{words}: metrics {got} instead of {whole}"
        last = f"step-{STEPS:06d}"
        wanted, found = tensors(self.whole, last), tensors(run, last)
        assert wanted.keys() == found.keys(), words
        for name, value in wanted.items():
            assert value.equal(found[name]), f"{words}: {name} differs"
        for adapter in ("adapter", "best"):
            files = [one / adapter / "adapter_model.safetensors" for one in (self.whole, run)]
            assert files[0].read_bytes() == files[1].read_bytes(), f"{words}: {adapter} differs"
        left = sorted({str(path.relative_to(run)) for path in run.rglob(".*")} - {".lock"})
        assert not left, f"{words}: left behind: {left}"


def survive(
    folder: Path, kills: int, seed: int, topologies: list[str], moments: list[str], say: Callable[[str], None]
) -> Counter[str]:
    """Kill `kills` times, over as many runs as needed; return the kills per moment. Raises AssertionError at the first loss."""
    chance, survived = random.Random(seed), Counter[str]()
    jobs = {name: Killed(folder, name) for name in topologies}
    number = 0
    while survived.total() < kills:
        topology = topologies[number % len(topologies)]
        # Rarely survived kinds of moment first, so that each has its turn.
        rarest = sorted(moments, key=lambda moment: (survived[moment], chance.random()))[: max(4, len(moments) // 2)]
        planned = min(chance.randint(2, 5), kills - survived.total())
        survived += jobs[topology].run(f"run-{number}", chance, planned, rarest)
        number += 1
        say(f"{topology} run {number}: {survived.total()} of {kills} kills survived")
    return survived


def main() -> None:
    """Print the number of survived kills per kind of moment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moment", choices=[*MOMENTS, ANY_TIME], help="only this one")
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        moments = [chosen.moment] if chosen.moment else [*MOMENTS, ANY_TIME]
        survived = survive(
            Path(folder), chosen.kills, chosen.seed, list(TOPOLOGIES), moments, lambda line: print(line, flush=True)
        )
    table = Table("moment", "kills survived", title=f"{survived.total()} kills, none lost anything; seed {chosen.seed}")
    for moment in moments:
        table.add_row(moment, str(survived[moment]))
    Console(width=100).print(table)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
