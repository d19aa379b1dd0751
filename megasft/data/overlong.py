"""Samples of at most so many tokens: what becomes of conversations that are longer."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

OverLong = Literal["drop", "truncate_left", "truncate_right", "split_turns"]
DEFAULT_OVERLONG: OverLong = "truncate_right"

Range = tuple[int, int]


class Turn(NamedTuple):
    """An assistant turn; all places are tokens (characters, before the text is tokenized).

    Attributes:
        answer: where it begins, its header included.
        end: where the message behind it begins.
        asked, asked_end: the user's request that it works on, and other messages between that and the first answer.
    """

    answer: int
    end: int
    asked: int
    asked_end: int


@dataclass(slots=True)
class Encoded:
    """One sample.

    Attributes:
        ids: int32 [T], the tokens.
        mask: bool [T], mask[t] says that token t is a target. The first token never is: nothing predicts it.
        preamble: number of tokens before the first user message (system prompt and tools).
        turns: the assistant's turns, between which `split_turns` cuts.
        parts: int32 [T], what a target is part of: 2 * the number of the assistant's turn, counted from 0 over all of
            them, + 1 in a tool call; empty where nobody said.
        notes: how often what of the conversation the rendering does not hold, in words.
    """

    ids: np.ndarray
    mask: np.ndarray
    preamble: int = 0
    turns: tuple[Turn, ...] = ()
    notes: Counter[str] = field(default_factory=Counter)
    parts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.ids)


def fit(
    encoded: Encoded, sequence_length: int, policy: OverLong = DEFAULT_OVERLONG, counts: Counter[str] | None = None
) -> list[Encoded]:
    """Cut a sample down to samples of at most `sequence_length` tokens, each with something to learn.

    "truncate_right" keeps the beginning and is the default: every target that is left has all the context it was
    written in, and long conversations are not lost as a group, as they are with "drop". "truncate_left" keeps the end.
    "split_turns" cuts before user messages and repeats the system prompt and tools. Where one request alone is worked
    on for longer, it cuts between the turns of that work, and keeps the request in front of what follows, and the turn
    before with its tool replies where there is room; a turn too long by itself is truncated on the right.

    Args:
        counts: gets what happened added: "kept", "dropped", "truncated" and "split" count conversations, "samples"
            what came out of them, "emptied" those of which no target was left, "targets cut" and "tokens cut" what was
            taken away of them and of all tokens.
    """
    counts = Counter() if counts is None else counts
    pieces: list[Encoded]
    if len(encoded) <= sequence_length:
        pieces, verdict = [encoded], "kept"
    elif policy == "drop":
        pieces, verdict = [], "dropped"
    elif policy == "truncate_left":
        pieces, verdict = [_cut(encoded, [(len(encoded) - sequence_length, len(encoded))])], "truncated"
    elif policy == "truncate_right":
        pieces, verdict = [_cut(encoded, [(0, sequence_length)])], "truncated"
    else:
        pieces, verdict = _split(encoded, sequence_length), "split"
    pieces = [piece for piece in pieces if piece.mask[1:].any()]
    counts[verdict if pieces else "dropped"] += 1
    counts["samples"] += len(pieces)
    if verdict != "kept":
        counts["emptied"] += not pieces and verdict != "dropped"
        counts["tokens cut"] += max(0, len(encoded) - sum(map(len, pieces)))
        counts["targets cut"] += int(encoded.mask.sum()) - sum(int(piece.mask.sum()) for piece in pieces)
    return pieces


def _cut(encoded: Encoded, ranges: list[Range], context: int = 0) -> Encoded:
    """The tokens of the given ranges, one behind the other; of the first `context` ranges none is a target."""
    mask = np.concatenate([encoded.mask[a:b] & (i >= context) for i, (a, b) in enumerate(ranges)])
    mask[:1] = False
    ids, parts = (np.concatenate([column[a:b] for a, b in ranges]) for column in (encoded.ids, encoded.parts))
    return Encoded(ids, mask, parts=parts)


def _split(encoded: Encoded, sequence_length: int) -> list[Encoded]:
    """Turns in their order, as many in a sample as fit."""
    turns = encoded.turns
    if not turns:
        return [_cut(encoded, [(0, sequence_length)])]
    ends = [*(turn.end for turn in turns[:-1]), len(encoded)]
    samples = []
    first = 0
    while first < len(turns):
        context, begin = ([], 0) if first == 0 else _context(encoded, first, ends[first], sequence_length)
        if context is None:  # what was asked does not fit: its later turns would answer nothing
            first += 1
            continue
        room = sequence_length - sum(b - a for a, b in context)
        last = first
        while last + 1 < len(turns) and ends[last + 1] - begin <= room:
            last += 1
        samples.append(_cut(encoded, [*context, (begin, min(ends[last], begin + room))], len(context)))
        first = last + 1
    return samples


def _context(encoded: Encoded, number: int, end: int, sequence_length: int) -> tuple[list[Range] | None, int]:
    """What stands in front of a sample that begins with a later turn, and where that begins; None if too much does.

    `end` is where the turn ends. A context without room for the turn must leave it a quarter of the sample.
    """
    turn, before = encoded.turns[number], encoded.turns[number - 1]
    preamble, request, replies = (0, encoded.preamble), (turn.asked, turn.asked_end), (before.answer, turn.answer)
    if turn.asked != before.asked:  # a new request: the sample begins with it
        return ([preamble] if encoded.preamble <= sequence_length // 2 else []), turn.asked
    for context in ([preamble, request, replies], [preamble, request], [request]):
        length = sum(b - a for a, b in context)
        needed = length + end - turn.answer if replies in context else length * 4 // 3
        if needed <= sequence_length:
            return context, turn.answer
    return None, turn.answer
