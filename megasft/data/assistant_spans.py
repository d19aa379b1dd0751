"""Which characters of a rendered conversation did the assistant write?

A template says so itself with `{% generation %}` marks, or it is found out:

1. `learn_frame` renders a tiny conversation once per tokenizer and reads off what the template writes around an
   assistant turn: the header (`<|im_start|>assistant\\n`) and the token that closes the turn (`<|im_end|>`).
2. Turn i starts behind the i-th header. Messages hold no control tokens when they are rendered (see `tokenizer.py`), so
   no message can forge one. Where a template has no constant header, the turn starts where the generation prompt of
   the messages before it ends, if that text is a prefix of the whole.
3. The finding is then proven for this conversation. Either each turn's characters are its `content`, nothing more; or,
   with tool calls and reasoning, the conversation is rendered once more with an unguessable mark planted in every
   text: the marks of turn i must appear in span i and nowhere else, no other message's mark in any span, and without
   the marks each span must read as before.

Rendering whole conversations keeps this right for templates that rewrite earlier turns (Qwen3 removes their thinking).
What cannot be proven is refused.
"""

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megasft.data.tokenizer import ChatTokenizer

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
WORD = re.compile(r"<[^<>]*>|[^\s<>]+")
PLANTING_CHARS = 4096  # of the end of a text are searched for its last word


class FrameError(Exception):
    """The template does not write turns in a way that can be told apart."""


class RefusedError(Exception):
    """The assistant's text in this conversation cannot be told with certainty."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around messages.

    Attributes:
        header: between the message before and the assistant's text; "" if there is no constant one.
        leads: what the template itself puts before an assistant's text ("", an empty thinking block).
        terminator: the token that closes an assistant turn.
        user_header: what opens a user's message.
        text: everything seen around the messages, leads excepted.
    """

    header: str
    leads: tuple[str, ...]
    terminator: str
    user_header: str
    text: str


def learn_frame(render: Callable[..., str], added_tokens: list[str]) -> Frame:
    """Find the frame by rendering a conversation of two rounds.

    Raises:
        FrameError: the template fails, loses or moves messages, or closes assistant turns with no token.
        jinja2.TemplateSyntaxError: it does not compile.
    """
    from jinja2 import TemplateSyntaxError

    words = [secrets.token_hex(8) for _ in range(4)]
    roles = ("user", "assistant") * 2
    rounds = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        whole, asked, prompt = render(rounds), render(rounds[:1]), render(rounds[:1], generation_prompt=True)
    except TemplateSyntaxError:
        raise
    except Exception as error:
        raise FrameError(f"the chat template fails on user and assistant messages ({error})") from error
    found = re.fullmatch("(.*)".join(["", *words, ""]), whole, re.DOTALL)
    if not found or words[0] not in asked or any(whole.count(word) != 1 for word in words):
        raise FrameError("the chat template moves, repeats or drops messages")
    before, to_first, back, to_second, after = found.groups()
    token = re.compile("|".join(map(re.escape, sorted(added_tokens, key=len, reverse=True))) or r"(?!)")
    closing, closing_last = token.search(back), token.search(after)
    if not closing or not closing_last or closing[0] != closing_last[0]:
        raise FrameError("the chat template does not close every assistant turn with the same token")

    user_tail, prompt_tail = asked.split(words[0])[1], prompt.partition(words[0])[2]
    common = _common_prefix(prompt_tail, to_first, to_second)
    for text in (prompt_tail, to_first, to_second):  # not in the middle of a token
        common = next((text[: m.start()] for m in token.finditer(text) if m.start() < len(common) < m.end()), common)
    header = common[len(user_tail) :] if common.startswith(user_tail) else ""
    leads = {"", to_first[len(common) :], to_second[len(common) :]} if header else {""}
    user_header = back[closing.end() :].lstrip()
    return Frame(header, tuple(leads), closing[0], user_header, "\n".join([before, common, back, after]))


def _common_prefix(first: str, *others: str) -> str:
    length = next((i for i, char in enumerate(first) if any(text[i : i + 1] != char for text in others)), len(first))
    return first[:length]


def assistant_spans(tokenizer: "ChatTokenizer", messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
    """The rendered text and, for each assistant message in order, the characters [start, end) it wrote.

    The token that closes a turn belongs to it. A turn of which the template leaves nothing (an earlier one that was all
    reasoning) gets an empty span: nobody should learn to say nothing. `messages` and `tools` must hold no control
    tokens.

    Raises:
        RefusedError: the spans cannot be proven.
        Exception: the template's own.
    """
    frame = tokenizer.frame
    if frame is None:
        raise RefusedError(f"{tokenizer.frame_error}; mark the assistant's text in it with {{% generation %}}")
    text, spans = _find(tokenizer, frame, messages, tools)
    if not _is_plain(frame, messages, text, spans):
        _prove(tokenizer, frame, messages, tools, text, spans)
    silent = [not text[start : end - len(frame.terminator)].strip() for start, end in spans]
    return text, [(end, end) if nothing else (start, end) for (start, end), nothing in zip(spans, silent, strict=True)]


def _find(tokenizer: "ChatTokenizer", frame: Frame, messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
    text = tokenizer.render(messages, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    starts = []
    if tokenizer.control.search(frame.header):
        starts = [match.end() for match in re.finditer(re.escape(frame.header), text)]
    if len(starts) != len(turns):
        prompts = [tokenizer.render(messages[:i], tools, generation_prompt=True) if i else "" for i in turns]
        if not all(prompt and text.startswith(prompt) for prompt in prompts):
            raise RefusedError("the chat template rewrites this conversation so that its turns cannot be told apart")
        starts = [len(prompt) for prompt in prompts]
    spans = []
    for start, limit in zip(starts, [*starts[1:], len(text)], strict=True):
        closing = text.find(frame.terminator, start, limit)
        if closing < 0:
            raise RefusedError(f"the chat template leaves an assistant turn without {frame.terminator}")
        spans.append((start, closing + len(frame.terminator)))
    return text, spans


def _is_plain(frame: Frame, messages: list[Message], text: str, spans: list[Span]) -> bool:
    """Whether every span is its message's content and every other message's content is somewhere in the text."""
    turn = iter(spans)
    for message in messages:
        content = message["content"].strip()
        if message["role"] != "assistant":
            if content not in text:
                return False
            continue
        start, end = next(turn)
        body = text[start : end - len(frame.terminator)]
        bodies = {body[len(lead) :].strip() for lead in frame.leads if body.startswith(lead)}
        if "tool_calls" in message or not content or content not in bodies:
            return False
    return True


def _prove(
    tokenizer: "ChatTokenizer", frame: Frame, messages: list[Message], tools: Tools, text: str, spans: list[Span]
) -> None:
    key = secrets.token_hex(8)
    planted = _Planter(key)
    marked = [planted.message(message, i) for i, message in enumerate(messages)]
    marked_text, marked_spans = _find(tokenizer, frame, marked, tools)
    any_mark = re.compile(f"{key}x[0-9]+x[0-9]+z")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, (start, end), (marked_start, marked_end) in zip(turns, spans, marked_spans, strict=True):
        marked_span = marked_text[marked_start:marked_end]
        if any_mark.sub("", marked_span) != text[start:end]:
            raise RefusedError(f"the chat template changes messages[{i}] in a way that hides who wrote what")
        if any(planted.owner[mark] != i for mark in any_mark.findall(marked_span)):
            raise RefusedError("the chat template writes one message into another's turn")
    everywhere = any_mark.findall(marked_text)
    within = sum(len(any_mark.findall(marked_text[start:end])) for start, end in marked_spans)
    owners = planted.owner
    if sum(messages[owners[mark]]["role"] == "assistant" for mark in everywhere) != within:
        raise RefusedError("the chat template writes an assistant's text outside its turn")
    seen = {owners[mark] for mark in everywhere}
    for mark in planted.required.difference(everywhere):
        raise RefusedError(f"the chat template leaves out a part of messages[{owners[mark]}]")
    for i, (start, end) in zip(turns, spans, strict=True):
        if i in owners.values() and i not in seen and text[start : end - len(frame.terminator)].strip():
            raise RefusedError(f"the chat template replaces what messages[{i}] says")


class _Planter:
    """Copies messages with a mark in each text, and remembers which mark is whose.

    Attributes:
        owner: mark -> index of its message.
        required: marks that the rendering must show. Others are in what templates may leave out: reasoning, and
            the words beside a tool call.
    """

    def __init__(self, key: str):
        self.key = key
        self.owner: dict[str, int] = {}
        self.required: set[str] = set()

    def message(self, message: Message, index: int) -> Message:
        required = message["role"] != "assistant"
        copy = {**message, "content": self._text(message["content"], index, required)}
        if "reasoning_content" in message:
            copy["reasoning_content"] = self._text(message["reasoning_content"], index, False)
        if "tool_calls" in message:
            copy["tool_calls"] = [
                {**call, "function": self._tree(call["function"], index)} for call in message["tool_calls"]
            ]
        return copy

    def _tree(self, value: Any, index: int) -> Any:
        if isinstance(value, str):
            return self._text(value, index, True)
        if isinstance(value, dict):
            return {key: self._tree(item, index) for key, item in value.items()}
        return [self._tree(item, index) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, index: int, required: bool) -> str:
        """Plant behind the first character of the last word, where no tag, and no test of a text's ends, is hurt."""
        skipped = max(0, len(text) - PLANTING_CHARS)
        words = [match for match in WORD.finditer(text, skipped) if not match[0].startswith("<")]
        if not words:
            return text
        mark = f"{self.key}x{index}x{len(self.owner)}z"
        self.owner[mark] = index
        if required:
            self.required.add(mark)
        at = words[-1].start() + 1
        return text[:at] + mark + text[at:]


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every text changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    return [map_strings(item, change) for item in value] if isinstance(value, list) else value
