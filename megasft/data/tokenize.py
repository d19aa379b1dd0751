"""Conversation files to tokens, block by block, in processes of their own where there is enough to do.

Blocks are read here and parsed, rendered and tokenized wherever there is a free process; what comes out is in the
order of the files, however many processes there are.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from megasft.data.conversations import Conversation, check_record
from megasft.data.overlong import DEFAULT_OVERLONG, Encoded, OverLong, fit
from megasft.data.problems import Notes, Problem
from megasft.data.records import Block, parse_block, read_blocks
from megasft.data.template import LostReasoning, TrainOn, encode_many
from megasft.data.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from megasft.config.schema import RunConfig

# A process takes seconds to start, in which this one tokenizes some thousand conversations.
BLOCKS_WITHOUT_PROCESSES = 16

Work = tuple[str, Block]  # the file that the block is of


@dataclass(frozen=True)
class Recipe:
    """All that decides what samples a conversation becomes, apart from the tokenizer and its template."""

    sequence_length: int
    train_on: TrainOn = "all"
    overlong: OverLong = DEFAULT_OVERLONG
    parse_special_in_text: bool = False
    lost_reasoning: LostReasoning = "refuse"
    ignore_keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: "RunConfig") -> "Recipe":
        """What a run file asks for."""
        data = config.data
        return cls(
            config.hyperparameters.sequence_length,
            data.train_on,
            data.overlong,
            data.parse_special_in_text,
            data.lost_reasoning,
            data.ignore_keys,
        )

    def nothing_left(self, dropped: int, longest: int) -> str:
        """Why there is no sample, and what would give some.

        Args:
            dropped: conversations that were too long.
            longest: tokens of the longest of them.
        """
        if not dropped:
            return "no conversation with something to learn from"
        other = ', or set overlong = "truncate_left"' if self.overlong != "truncate_left" else ""
        return (
            f"nothing is left to learn from: all {dropped:,} conversations are longer than [hyperparameters] "
            f"sequence_length = {self.sequence_length} (the longest has {longest:,} tokens), and [data] overlong = "
            f'"{self.overlong}" leaves no supervised token of any; raise sequence_length{other}'
        )


@dataclass
class Tokens:
    """The samples of a block end to end: ids int32 [T], mask bool [T], lengths int64 [samples].

    Attributes:
        parts: int32 [T], `Encoded.parts`.
        file, lines: of the conversation that each sample is of, int64 [samples].
        counts: what `fit` did with the conversations.
        notes: what the samples do not hold of their conversations.
        longest: tokens of the longest conversation.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    problems: list[Problem]
    counts: Counter[str]
    notes: Notes = field(default_factory=Notes)
    longest: int = 0
    parts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    file: str = ""
    lines: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, samples: Sequence[Encoded]) -> "Tokens":
        """Lay samples end to end."""
        ids = np.concatenate([np.zeros(0, np.int32), *(one.ids for one in samples)])
        mask = np.concatenate([np.zeros(0, np.bool_), *(one.mask for one in samples)])
        parts = np.concatenate([np.zeros(0, np.int32), *(one.parts for one in samples)])
        return cls(ids, mask, np.array([len(one) for one in samples], np.int64), [], Counter(), parts=parts)


def tokenize_files(
    files: Sequence[Path], tokenizer: ChatTokenizer, recipe: Recipe, workers: int | None = None
) -> Iterator[Tokens]:
    """Tokenize every conversation of `files`, in their order.

    Args:
        workers: processes to start when there is more than a little to do, by default one for each core that this
            process may use. 0: none.
    """
    blocks = _blocks(files)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    for work in islice(blocks, BLOCKS_WITHOUT_PROCESSES if workers else None):
        yield tokenize_block(work, tokenizer, recipe)
    first = next(blocks, None)
    if first is not None:
        yield from _in_processes(first, blocks, tokenizer, recipe, workers)


def tokenize_block(work: Work, tokenizer: ChatTokenizer, recipe: Recipe) -> Tokens:
    """Parse, check, render, tokenize and cut the records of one block."""
    file, block = work
    records = [
        check_record(record, file, line, begin, recipe.ignore_keys) for line, record, begin in parse_block(block)
    ]
    conversations = [record for record in records if isinstance(record, Conversation)]
    encoded = encode_many(
        conversations, tokenizer, recipe.train_on, recipe.parse_special_in_text, recipe.lost_reasoning
    )
    counts: Counter[str] = Counter()
    samples: list[Encoded] = []
    lines: list[int] = []
    notes, longest = Notes(), 0
    problems = [record for record in records if isinstance(record, Problem)]
    for conversation, one in zip(conversations, encoded, strict=True):
        if isinstance(one, Problem):
            problems.append(one)
        else:
            samples += fit(one, recipe.sequence_length, recipe.overlong, counts)
            lines += [conversation.line] * (len(samples) - len(lines))
            notes.add(conversation.notes + one.notes, file, conversation.line)
            longest = max(longest, len(one))
    tokens = Tokens.of(samples)
    tokens.problems, tokens.counts = sorted(problems, key=lambda problem: problem.line), counts
    tokens.notes, tokens.longest = notes, longest
    tokens.file, tokens.lines = file, np.array(lines, np.int64)
    return tokens


def _blocks(files: Sequence[Path]) -> Iterator[Work]:
    for file in files:
        empty = True
        for block in read_blocks(file):
            empty = False
            yield str(file), block
        if empty:
            yield str(file), Block([(1, b"", "the file holds no conversation")])


# --- processes -------------------------------------------------------------------------------------------------------


def _in_processes(
    first: Work, rest: Iterator[Work], tokenizer: ChatTokenizer, recipe: Recipe, workers: int
) -> Iterator[Tokens]:
    threads = ThreadPoolExecutor(workers)
    started = [_Worker() for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    pending: deque[Future[Tokens]] = deque()

    def tokenize(work: Work) -> Tokens:
        worker = idle.get()
        try:
            return worker.ask(work)
        finally:
            idle.put(worker)

    try:
        setup = pickle.dumps((tokenizer, recipe))
        for worker in started:
            worker.send(setup)
            idle.put(worker)
        pending.append(threads.submit(tokenize, first))
        for work in rest:
            pending.append(threads.submit(tokenize, work))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for worker in started:
            worker.stop()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that tokenizes blocks: pickles in through its standard input, and out through a pipe.

    Not one of `multiprocessing`: those run the user's main script a second time, and a rank that holds a GPU and
    threads cannot be forked. Tokenizing has no use for torch, whose import would take seconds and half a gigabyte.
    """

    def __init__(self) -> None:
        answers, to_us = os.pipe()
        program = (
            "from megasft.launch.parent import on_parent_death; on_parent_death(9); "
            "import sys; sys.modules['torch'] = None; "
            f"from megasft.data.tokenize import serve; serve(sys.stdin.buffer, {to_us})"
        )
        environment = {
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=(to_us,),
            env=os.environ | environment,
        )
        os.close(to_us)
        self.answers = os.fdopen(answers, "rb")

    def send(self, message: bytes) -> None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except OSError:
            self._died()

    def ask(self, work: Work) -> Tokens:
        self.send(pickle.dumps(work, protocol=pickle.HIGHEST_PROTOCOL))
        try:
            return pickle.load(self.answers)
        except (EOFError, pickle.UnpicklingError):
            self._died()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # what was still buffered has no reader
            self.process.stdin.close()

    def _died(self) -> NoReturn:
        raise RuntimeError(f"a tokenizing process ended early (exit code {self.process.wait()}; -9: out of memory?)")


def serve(requests: Any, answers: int) -> None:
    """What such a process does until its standard input ends, or nobody reads its answers."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends us
    tokenizer, recipe = pickle.load(requests)
    with contextlib.suppress(EOFError, BrokenPipeError), os.fdopen(answers, "wb") as stream:
        while True:
            tokens = tokenize_block(pickle.load(requests), tokenizer, recipe)
            pickle.dump(tokens, stream, protocol=pickle.HIGHEST_PROTOCOL)
            stream.flush()
