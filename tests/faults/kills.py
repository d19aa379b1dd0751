"""Kill ranks or launcher of a tiny job at random moments, repeatedly, and compare its results with those of a whole run.

    python -m tests.faults.kills --kills 40 --seed 0
    python -m tests.faults.kills --kills 10 --launcher torchrun

The same command restarts each run until it is complete. After every kill, all processes must end within seconds, all
checkpoints must verify, and the newest one must not be older than before. At the end, adapters, optimizer states and
metrics must be bitwise those of the uninterrupted run.
"""

import argparse
import functools
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from megasft.train.checkpoint.folder import Checkpoints, damage
from tests.parallel.resume import lines, tensors
from tests.support.forked import LAUNCHER, Command
from tests.support.processes import kill_marked, marked
from tests.support.world import make_world

STEPS = 8
TOPOLOGIES = {"TP=2": {"tensor": 2}, "DP=2": {"data": 2}}
SETTINGS = ("lora.dropout=0.2", "checkpoint.keep=2", "training.validation.eval_steps=3")

ROOT = Path(__file__).parents[2]
Survived = Counter[tuple[str, str]]  # how often, by moment and victim

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
        *_around("megasft.train.forward_backward:ForwardBackward", "__call__", False), *_around(TRAINER, "step", False),
        *_around(TRAINER + "Trainer", "train_step", False),
    ],
    "metrics": [*_around("megasft.train.metrics:Metrics", "_write"), Point("megasft.train.metrics:Metrics", "_write", "half")],
    "validation": [
        *_around(TRAINER + "Trainer", "validate", False), *_around(TRAINER + "Trainer", "evaluate", False),
        *_around(PATH, "rename", True, lambda path, target: "best" in path.name + Path(target).name),
        *_around("megasft.storage.new_folder:", "_exchange", True, lambda new, _: "best" in new.name),
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
START, ANY_TIME = "the start", "any time"
LAUNCHERS = ("forked", "separate", "torchrun")  # `megasft train` with ranks forked, or not; the others take seconds
VICTIMS = ("a rank", "the launcher", "all")
# How often these come up in an attempt, about; others some three times.
OFTEN = {"step": 7, "metrics": 10, "data preparation": 1, "loading": 1, "writing the final adapter": 1}


def arm(moment: str, place: int, nth: int, rank: int, victim: str) -> None:
    """In `rank`: at the nth call of a moment's point, kill it, or its launcher, or all at once."""
    if os.environ["RANK"] != str(rank):
        return
    point = MOMENTS[moment][place]
    module, _, member = point.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, member) if member else owner
    original = getattr(owner, point.name)
    calls = 0

    def die() -> None:
        if victim == "the launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            return
        os.killpg(0, signal.SIGKILL) if victim == "all" else os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += point.test(*args)
        now = calls == nth and point.test(*args)
        if now and point.when == "half" and victim != "the launcher":
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


# --- runs ------------------------------------------------------------------------------------------------------------


class Program(Command):
    """The same, as a program of its own whose ranks are programs of their own, with a `launcher` of LAUNCHERS."""

    def __init__(self, arguments: Sequence[str], errors: Path, launcher: str) -> None:
        script = ROOT / "tests" / "support" / "separate_ranks.py"
        command = [sys.executable, str(script), *arguments]
        if launcher == "torchrun":
            command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", *command[1:]]
        self.errors, self._mark = errors, uuid.uuid4().hex
        self._before = errors.stat().st_size if errors.exists() else 0
        with open(errors, "ab") as stream:
            self._program = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stream, env=os.environ | {"MARK": self._mark}, cwd=ROOT
            )
        self.pid, self._started = self._program.pid, time.monotonic()

    def alive(self) -> list[int]:
        return list(marked(self._mark))

    def kill_all(self) -> None:
        kill_marked(self._mark)

    def exit_code(self) -> int:
        return self._program.wait()


class Killed:
    """A tiny job under a topology, with one uninterrupted run."""

    def __init__(self, folder: Path, topology: str, launcher: str) -> None:
        self.folder, self.launcher = folder / topology, launcher
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
        if self.launcher != "forked":
            return Program(arguments, run.with_suffix(".err"), self.launcher)
        return Command(arguments, run.with_suffix(".err"), in_rank=arm if fault else None, args=fault)

    def run(self, name: str, chance: random.Random, kills: int, moments: list[str]) -> Survived:
        """One run, killed up to so many times: how often at which moment. Raises AssertionError if it lost anything."""
        survived: Survived = Counter()
        run, cache, newest = self.folder / name, "cache", 0
        while True:
            moment = chance.choice(moments) if survived.total() < kills else ""
            victim = chance.choice(VICTIMS)
            if moment == "data preparation":
                cache = f"cache-{name}-{survived.total()}"
            command, words = self._attempt(run, cache, moment, victim, chance)
            words = f"{name}, {moment or 'in peace'} {words}"
            try:
                code = command.wait()
            except TimeoutError as error:
                raise AssertionError(words) from error
            newest = self._check(run, newest, words)
            if code == 0:
                self._compare(run, words)
                return survived
            assert self.launcher == "torchrun" or "Traceback" not in command.said(), f"{words}: {command.said()}"
            assert moment, f"{words} ends with {code}: {command.said()}"
            assert code in (1, -signal.SIGKILL), f"{words} ends with {code}: {command.said()}"
            survived[moment, victim] += 1

    def _attempt(self, run: Path, cache: str, moment: str, victim: str, chance: random.Random) -> tuple[Command, str]:
        if not moment:
            return self._start(run, cache), ""
        rank = chance.choice([0, 1])
        if moment in (START, ANY_TIME):
            command, seconds = self._start(run, cache), chance.uniform(0, self.seconds / (1 + 2 * (moment == START)))
            ended = time.monotonic() + seconds
            while (time.monotonic() < ended or (victim == "a rank" and len(command.ranks()) < 2)) and command.alive():
                time.sleep(0.01)
            command.kill({"a rank": rank, "the launcher": LAUNCHER, "all": None}[victim])
            return command, f"after {seconds:.2f} s, {victim} ({rank})"
        place, nth = chance.randrange(len(MOMENTS[moment])), chance.randint(1, OFTEN.get(moment, 3))
        point = MOMENTS[moment][place]
        rank = 0 if point.first_rank_only else rank
        words = f"({point.when} call {nth} of {point.owner}{point.name} in rank {rank}, {victim})"
        return self._start(run, cache, moment, place, nth, rank, victim), words

    def _check(self, run: Path, newest: int, words: str) -> int:
        """Verify every checkpoint against its manifest; return the newest one's step, which must not be before `newest`."""
        checkpoints = Checkpoints(run / "checkpoints")
        steps = [int(folder.name.removeprefix("step-")) for folder in checkpoints.all()]
        for folder in checkpoints.all():
            assert damage(folder) is None, f"{words}: {folder}: {damage(folder)}"
        assert max(steps, default=0) >= newest, f"{words}: step {newest} was there, now {steps}"
        for adapter in filter(Path.exists, (run / "adapter", run / "best")):
            assert load_file(adapter / "adapter_model.safetensors"), words
            assert json.loads((adapter / "adapter_config.json").read_text()), words
        latest = checkpoints.folder / "latest"
        assert not latest.is_symlink() or latest.exists(), f"{words}: {latest} leads nowhere"
        return max(steps, default=0)

    def _compare(self, run: Path, words: str) -> None:
        whole, got = ([line for line in lines(one) if line["kind"] != "event"] for one in (self.whole, run))
        # Ranks whose launcher is killed save the run as it is, so that there may be more checkpoints.
        got = [line for line in got if line["kind"] != "checkpoint" or line in whole]
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
    folder: Path,
    kills: int,
    seed: int,
    topologies: list[str],
    moments: list[str],
    say: Callable[[str], None],
    launcher: str = "forked",
) -> Survived:
    """Kill `kills` times, over as many runs as needed; return the kills per moment. Raises AssertionError at the first loss."""
    chance, survived = random.Random(seed), Survived()
    jobs = {name: Killed(folder, name, launcher) for name in topologies}
    number = 0
    while survived.total() < kills:
        topology = topologies[number % len(topologies)]
        # Rarely survived kinds of moment first, so that each has its turn.
        rarest = sorted(moments, key=lambda moment: (_of(survived, moment), chance.random()))[
            : max(4, len(moments) // 2)
        ]
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
    parser.add_argument("--moment", choices=[*MOMENTS, START, ANY_TIME], help="only this one")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="forked")
    chosen = parser.parse_args()
    started = time.monotonic()
    moments = [START, ANY_TIME] if chosen.launcher != "forked" else [*MOMENTS, START, ANY_TIME]
    moments = [chosen.moment] if chosen.moment else moments
    with tempfile.TemporaryDirectory() as folder:
        survived = survive(
            Path(folder), chosen.kills, chosen.seed, list(TOPOLOGIES), moments, lambda line: print(line, flush=True),
            chosen.launcher,
        )  # fmt: skip
    title = f"{survived.total()} kills ({chosen.launcher}), none lost or left anything; seed {chosen.seed}"
    table = Table("moment", *VICTIMS, "kills survived", title=title)
    for moment in moments:
        table.add_row(moment, *(str(survived[moment, victim]) for victim in VICTIMS), str(_of(survived, moment)))
    table.add_row("", *(str(sum(survived[moment, victim] for moment in moments)) for victim in VICTIMS), "")
    Console(width=120).print(table)
    print(f"{time.monotonic() - started:.0f} s")


def _of(survived: Survived, moment: str) -> int:
    return sum(survived[moment, victim] for victim in VICTIMS)


if __name__ == "__main__":
    main()
