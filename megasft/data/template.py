"""Conversation -> token ids and the mask of what the assistant wrote, and what to do with those that are too long.

The whole rendered text is tokenized at once, as transformers does it. A token is supervised if it begins inside an
assistant's span. The one case in which that matters is a text that begins with a newline behind a header that ends with
one: where the tokenizer joins the two, the joined token begins in the header and is not supervised.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers

from megasft.data.assistant_spans import RefusedError, Span, assistant_spans, map_strings, strings
from megasft.data.conversations import Conversation, Problem
from megasft.data.records import visible
from megasft.data.tokenizer import STAND_IN, ChatTokenizer

TrainOn = Literal["all", "last"]
OverLong = Literal["drop", "truncate_left", "truncate_right", "split_turns"]
DEFAULT_OVERLONG: OverLong = "truncate_right"
BATCH = 256


@dataclass(slots=True)
class Encoded:
    """One sample.

    Attributes:
        ids: int32 [T], the tokens.
        mask: bool [T], mask[t] says that token t is a target. The first token never is: nothing predicts it.
        preamble: number of tokens before the first user message (system prompt and tools).
        cuts: token positions at which a new message begins behind an assistant turn; `split_turns` cuts there.
    """

    ids: np.ndarray
    mask: np.ndarray
    preamble: int = 0
    cuts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    train_on: TrainOn = "all",
    parse_special_in_text: bool = False,
) -> Encoded | Problem:
    """`encode_many` for one conversation."""
    return encode_many([conversation], tokenizer, train_on, parse_special_in_text)[0]


def encode_many(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    train_on: TrainOn = "all",
    parse_special_in_text: bool = False,
) -> list[Encoded | Problem]:
    """Render, tokenize and mask conversations; each becomes an `Encoded`, or the `Problem` that prevents it.

    Args:
        train_on: "all" supervises every assistant turn, "last" only the last; a turn with `loss` off never is.
        parse_special_in_text: read control tokens in messages as tokens. Off, they are text, and nobody can close a
            turn by typing `<|im_end|>`.
    """
    results: list[Encoded | Problem] = []
    for first in range(0, len(conversations), BATCH):
        batch = conversations[first : first + BATCH]
        rendered = [_render(conversation, tokenizer, train_on, parse_special_in_text) for conversation in batch]
        for guarded in (False, True):
            chosen = [i for i, one in enumerate(rendered) if isinstance(one, _Rendered) and one.guarded == guarded]
            if chosen:
                encodings = tokenizer.encode([rendered[i].text for i in chosen], guarded)
                for i, encoding in zip(chosen, encodings, strict=True):
                    rendered[i] = _place(rendered[i], encoding, batch[i])
        results += rendered
    return results


def fit(
    encoded: Encoded, sequence_length: int, policy: OverLong = DEFAULT_OVERLONG, counts: Counter[str] | None = None
) -> list[Encoded]:
    """Cut a sample down to samples of at most `sequence_length` tokens, each with something to learn.

    "truncate_right" keeps the beginning and is the default: every target that is left has all the context it was
    written in, and long conversations are not lost as a group, as they are with "drop". "truncate_left" keeps the end.
    "split_turns" cuts between turns and repeats the system prompt and tools; a turn too long by itself is truncated on
    the right.

    Args:
        counts: gets what happened added: "kept", "dropped", "truncated" and "split" count conversations, "samples"
            what came out of them.
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
    return pieces


# --- parts of encode_many --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rendered:
    text: str
    guarded: bool
    spans: list[Span]  # supervised characters
    preamble: int  # characters before the first user message
    cuts: list[int]  # characters


def _render(
    conversation: Conversation, tokenizer: ChatTokenizer, train_on: TrainOn, parse_special_in_text: bool
) -> Any:
    messages, tools = conversation.messages, conversation.tools
    try:
        hidden = any(tokenizer.control.search(text) for text in strings([messages, tools]))
        if hidden:
            if any(STAND_IN.search(text) for text in strings([messages, tools])):
                raise RefusedError("holds both control tokens and the private characters that stand for them")
            messages, tools = map_strings(messages, tokenizer.swap), map_strings(tools, tokenizer.swap)
        turns = [
            on for on, message in zip(conversation.supervised, messages, strict=True) if message["role"] == "assistant"
        ]
        if train_on == "last":
            turns = [False] * (len(turns) - 1) + turns[-1:]
        marks = tokenizer.generation_marks(messages, tools)
        text, spans = marks or assistant_spans(tokenizer, messages, tools)
        if len(spans) != len(turns):
            if not all(turns):
                raise RefusedError("the template's generation marks are not one for each assistant message")
            turns = [True] * len(spans)
        supervised = [span for span, on in zip(spans, turns, strict=True) if on and span[0] < span[1]]
        if not supervised:
            raise RefusedError("nothing to learn from: no assistant turn is supervised")
        preamble = text.find(tokenizer.frame.user_header) if tokenizer.frame and tokenizer.frame.user_header else 0
        following = [tokenizer.control.search(text, end) for _, end in spans]
        cuts = [match.start() for match in following if match]
        if hidden:
            shown = tokenizer.reveal(text)
            if shown != tokenizer.render(conversation.messages, conversation.tools):
                raise RefusedError("the chat template acts on control tokens in messages")
            text = shown if parse_special_in_text else tokenizer.swap(text)
        guarded = hidden and not parse_special_in_text
        return _Rendered(text, guarded, supervised, max(preamble, 0), cuts)
    except RefusedError as error:
        return Problem(conversation.file, conversation.line, str(error))
    except Exception as error:  # a template is a program: it may raise anything, on purpose or not
        reason = f"the chat template fails: {visible(str(error) or type(error).__name__, 160)}"
        return Problem(conversation.file, conversation.line, reason)


def _place(rendered: _Rendered, encoding: tokenizers.Encoding, conversation: Conversation) -> Encoded | Problem:
    """From characters to tokens."""
    begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
    mask = np.zeros(len(begins), dtype=np.bool_)
    for start, end in rendered.spans:
        first, last = np.searchsorted(begins, (start, end))
        mask[first:last] = True
    mask[:1] = False
    if not mask.any():
        return Problem(conversation.file, conversation.line, "nothing to learn from: the assistant's text has no token")
    positions = np.searchsorted(begins, np.array([rendered.preamble, *rendered.cuts])).tolist()
    return Encoded(np.array(encoding.ids, dtype=np.int32), mask, positions[0], tuple(positions[1:]))


# --- parts of fit ----------------------------------------------------------------------------------------------------


def _cut(encoded: Encoded, ranges: list[tuple[int, int]]) -> Encoded:
    """The tokens of the given ranges, one behind the other."""
    mask = np.concatenate([encoded.mask[a:b] for a, b in ranges])
    mask[:1] = False
    return Encoded(np.concatenate([encoded.ids[a:b] for a, b in ranges]), mask)


def _split(encoded: Encoded, sequence_length: int) -> list[Encoded]:
    """Whole turns, as many as fit behind the preamble; a preamble longer than half a sample is not repeated."""
    preamble = encoded.preamble if encoded.preamble <= sequence_length // 2 else 0
    bounds = [*(cut for cut in encoded.cuts if 0 < cut < len(encoded)), len(encoded)]
    ranges, begin, end = [], 0, 0
    for bound in bounds:
        if end > begin and (preamble if begin else 0) + bound - begin > sequence_length:
            ranges.append((begin, end))
            begin = end
        end = bound
    ranges.append((begin, end))
    samples = []
    for begin, end in ranges:
        head = preamble if begin else 0
        samples.append(_cut(encoded, [(0, head), (begin, min(end, begin + sequence_length - head))]))
    return samples
