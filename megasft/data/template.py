"""Conversation -> token ids and the mask of what the assistant wrote.

The whole rendered text is tokenized at once, as transformers does it. A token is supervised if it begins inside an
assistant's span. The one case in which that matters is a text that begins with a newline behind a header that ends with
one: where the tokenizer joins the two, the joined token begins in the header and is not supervised.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers

from megasft.data.assistant_spans import MARKS_INCOMPLETE, assistant_turns
from megasft.data.conversations import Conversation
from megasft.data.overlong import Encoded, Turn
from megasft.data.problems import Problem
from megasft.data.records import visible
from megasft.data.rendering_proof import RefusedError, Span, map_strings, strings
from megasft.data.tokenizer import STAND_IN, ChatTokenizer

# What the templates of Qwen3 and Qwen3-Coder write around a call, of which a turn may lack the end.
CALL = re.compile("<tool_call>.*?(?:</tool_call>|$)", re.DOTALL)
TrainOn = Literal["all", "last"]
LostReasoning = Literal["refuse", "accept"]
BATCH = 256

LOST_REASONING = "assistant messages whose reasoning the chat template leaves out"
UNREAD_VARIABLE = "`chat_template_kwargs` {} that the chat template does not have"
NOTHING_LEFT = "assistant messages of which the chat template leaves nothing"


def encode(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    train_on: TrainOn = "all",
    parse_special_in_text: bool = False,
    lost_reasoning: LostReasoning = "refuse",
) -> Encoded | Problem:
    """`encode_many` for one conversation."""
    return encode_many([conversation], tokenizer, train_on, parse_special_in_text, lost_reasoning)[0]


def encode_many(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    train_on: TrainOn = "all",
    parse_special_in_text: bool = False,
    lost_reasoning: LostReasoning = "refuse",
) -> list[Encoded | Problem]:
    """Render, tokenize and mask conversations; each becomes an `Encoded`, or the `Problem` that prevents it.

    Args:
        train_on: "all" supervises every assistant turn, "last" only the last; a turn with `loss` off never is.
        parse_special_in_text: read control tokens in messages as tokens. Off, they are text, and nobody can close a
            turn by typing `<|im_end|>`.
        lost_reasoning: what to do about a supervised turn whose reasoning the template leaves out: trained on, it
            teaches not to think. In turns that are not supervised it is what a server does too.
    """
    results: list[Encoded | Problem] = []
    for first in range(0, len(conversations), BATCH):
        batch = conversations[first : first + BATCH]
        rendered = [
            _render(conversation, tokenizer, train_on, parse_special_in_text, lost_reasoning) for conversation in batch
        ]
        for guarded in (False, True):
            chosen = [i for i, one in enumerate(rendered) if isinstance(one, _Rendered) and one.guarded == guarded]
            if chosen:
                encodings = tokenizer.encode([rendered[i].text for i in chosen], guarded)
                for i, encoding in zip(chosen, encodings, strict=True):
                    rendered[i] = _place(rendered[i], encoding, batch[i])
        results += rendered
    return results


# --- parts of encode_many --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rendered:
    """A rendered conversation; places are characters."""

    text: str
    guarded: bool
    spans: dict[int, Span]  # supervised, by the number of the assistant's turn
    preamble: int  # before the first user message
    turns: list[Turn]
    notes: Counter[str]


def _render(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    train_on: TrainOn,
    parse_special_in_text: bool,
    lost_reasoning: LostReasoning,
) -> Any:
    messages, tools, variables = conversation.messages, conversation.tools, conversation.template_args
    notes: Counter[str] = Counter()
    try:
        hidden = any(tokenizer.control.search(text) for text in strings([messages, tools]))
        if hidden:
            if any(STAND_IN.search(text) for text in strings([messages, tools])):
                raise RefusedError("holds both control tokens and the private characters that stand for them")
            messages, tools = map_strings(messages, tokenizer.swap), map_strings(tools, tokenizer.swap)
        if any(tokenizer.control.search(text) for text in strings(variables)):
            raise RefusedError("`chat_template_kwargs` holds control tokens")
        speaking = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [conversation.supervised[i] for i in speaking]
        if train_on == "last":
            wanted = [False] * (len(wanted) - 1) + wanted[-1:]
        found = assistant_turns(tokenizer, messages, tools, variables)
        text, spans = found.text, found.spans
        lost = [i for i, on in zip(speaking, wanted, strict=True) if on and i in found.lost_reasoning]
        if lost and lost_reasoning == "refuse":
            raise RefusedError(_lost_reasoning(lost, conversation, found.lost_reasoning))
        notes[LOST_REASONING] += len(found.lost_reasoning)
        for i, on, (start, end) in zip(speaking, wanted, spans, strict=True):
            if on and start == end and i not in found.lost_reasoning:
                raise RefusedError("the chat template leaves nothing of {}", i)
            notes[NOTHING_LEFT] += on and start == end
        notes[MARKS_INCOMPLETE] += found.marks_incomplete
        notes += _unseen(messages, text)
        notes.update(UNREAD_VARIABLE.format(name) for name in variables if not tokenizer.reads(name))
        supervised = {
            turn: span for turn, (span, on) in enumerate(zip(spans, wanted, strict=True)) if on and span[0] < span[1]
        }
        if not supervised:
            raise RefusedError("nothing to learn from: no assistant turn is supervised")
        preamble = max(text.find(tokenizer.frame.user_header), 0) if tokenizer.frame else 0
        turns = _turns(messages, text, spans, preamble, tokenizer)
        if hidden:
            shown = tokenizer.reveal(text)
            if shown != tokenizer.render(conversation.messages, conversation.tools, **variables):
                raise RefusedError("the chat template acts on control tokens in messages")
            text = shown if parse_special_in_text else tokenizer.swap(text)
        guarded = hidden and not parse_special_in_text
        return _Rendered(text, guarded, supervised, preamble, turns, +notes)
    except RefusedError as error:
        reason = str(error)
        if error.message is not None:
            reason = reason.replace("{}", _name(error.message, conversation)) + _advice(conversation)
        return Problem(conversation.file, conversation.line, reason)
    except Exception as error:  # a template is a program: it may raise anything, on purpose or not
        reason = f"the chat template fails: {visible(str(error) or type(error).__name__, 160)}"
        return Problem(conversation.file, conversation.line, reason + _advice(conversation))


def _name(index: int, conversation: Conversation) -> str:
    """What the record calls a message."""
    role = conversation.messages[index]["role"]
    index -= conversation.inserted
    return f"messages[{index}] ({role})" if index >= 0 else "`system`"


def _advice(conversation: Conversation) -> str:
    """How to write what some templates have no place for."""
    roles = [message["role"] for message in conversation.messages]
    if "developer" in roles:
        return "; templates without a `developer` take `system`: write it so"
    if "system" in roles[1:]:
        return "; if it is a later system message, put its text into the user message behind it"
    if "tool" in roles and not any("tool_calls" in message for message in conversation.messages):
        return "; if it is the tool replies, use a template with tools, or write them as user messages"
    return ""


def _lost_reasoning(lost: list[int], conversation: Conversation, everywhere: list[int]) -> str:
    """Why a conversation is refused, with what would work."""
    names = ", ".join(_name(i, conversation) for i in lost[:3]) + (", ..." if len(lost) > 3 else "")
    speaking = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    earlier = speaking[-1] not in everywhere
    last = ', learn from the last turn only with [data] train_on = "last"' if earlier else ""
    return (
        f"the chat template leaves out the reasoning of {len(lost)} message{'s' * (len(lost) > 1)} to learn from "
        f"({names}), which teaches not to think; train a model whose template keeps it{last}, "
        'or accept it with [data] lost_reasoning = "accept"'
    )


def _unseen(messages: list[dict[str, Any]], text: str) -> Counter[str]:
    """Names and ids that the template did not write."""
    unseen: Counter[str] = Counter()
    for message in messages:
        for key in ("name", "tool_call_id"):
            if key in message and message[key] not in text:
                unseen[f"`{key}` that the chat template leaves out"] += 1
        for call in message.get("tool_calls", ()):
            if "id" in call and call["id"] not in text:
                unseen["`id` of tool calls that the chat template leaves out"] += 1
    return unseen


def _turns(
    messages: list[dict[str, Any]], text: str, spans: list[Span], preamble: int, tokenizer: ChatTokenizer
) -> list[Turn]:
    """Where each assistant turn, and what it answers, begins and ends."""
    header, user_header = (tokenizer.frame.header, tokenizer.frame.user_header) if tokenizer.frame else ("", "")
    speaking = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns: list[Turn] = []
    before, request = 0, (0, 0)
    for k, (i, (start, end)) in enumerate(zip(speaking, spans, strict=True)):
        opened = text.rfind(header, turns[-1].end if turns else 0, start) if header else -1
        answer = opened if opened >= 0 else start
        asking = [message["role"] for message in messages[before:i]]
        asked = None  # where a message begins that is the user's
        if k == 0:
            asked = preamble
        elif "user" in asking and asking[0] != "tool":
            asked = turns[-1].end
        elif asking and asking[-1] == "user" and user_header:
            asked = text.rfind(user_header, turns[-1].end, answer)
        if asked is not None and asked >= 0:
            request = (asked, answer)
        following = tokenizer.control.search(text, end)
        turns.append(Turn(answer, following.start() if following else len(text), *request))
        before = i + 1
    return turns


def _place(rendered: _Rendered, encoding: tokenizers.Encoding, conversation: Conversation) -> Encoded | Problem:
    """From characters to tokens."""
    begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
    mask, parts = np.zeros(len(begins), dtype=np.bool_), np.zeros(len(begins), dtype=np.int32)
    for turn, (start, end) in rendered.spans.items():
        first, last = np.searchsorted(begins, (start, end))
        mask[first:last] = True
        parts[first:last] = 2 * turn
        for call in CALL.finditer(rendered.text, start, end):
            first, last = np.searchsorted(begins, call.span())
            parts[first:last] = 2 * turn + 1
    mask[:1] = False
    if not mask.any():
        return Problem(conversation.file, conversation.line, "nothing to learn from: the assistant's text has no token")
    places = np.searchsorted(
        begins, np.array([rendered.preamble, *(place for turn in rendered.turns for place in turn)])
    )
    preamble, *rest = places.tolist()
    turns = tuple(Turn(*rest[i : i + 4]) for i in range(0, len(rest), 4))
    return Encoded(np.array(encoding.ids, dtype=np.int32), mask, preamble, turns, rendered.notes, parts)
