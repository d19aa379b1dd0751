"""Does a rendering hold all that a conversation says, each text where it belongs?

Either each turn's characters are its `content`, nothing more, and every other message's content lies between the turns
in its order. Or, with tool calls and reasoning, the conversation is rendered once more with an unguessable mark planted
in every text: the marks of turn i must appear in span i and nowhere else, no other message's mark in any span, and
without the marks each span must read as before. What is reasoning and not in the rendering is reported; anything else
that is not is refused.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
Find = Callable[[list[Message]], tuple[str, list[Span]]]
WORD = re.compile(r"<[^<>]*>|[^\s<>]+")
PLANTING_CHARS = 4096  # of the end of a text are searched for its last word
DISTINCT_CHARS = 20  # a text of so many is not found in a rendering by chance


class RefusedError(Exception):
    """A conversation cannot be masked with certainty. `message` is the index of the message that `{}` stands for."""

    def __init__(self, reason: str, message: int | None = None):
        super().__init__(reason)
        self.message = message


def is_plain(messages: list[Message], text: str, spans: list[Span], leads: tuple[str, ...], closing: int) -> bool:
    """Whether every span is its message's content, and the content of all others lies between the spans in order.

    Args:
        leads: what the template may put before an assistant's text.
        closing: characters of the token that closes a turn.
    """
    turns, position = list(spans), 0
    for message in messages:
        content = message["content"].strip()
        if message["role"] != "assistant":
            limit = turns[0][0] if turns else len(text)
            position = text.find(content, position, limit)
            if position < 0 or (message["role"] != "user" and len(content) < DISTINCT_CHARS):
                return False
            position += len(content)
            continue
        start, end = turns.pop(0)
        position = end
        body = text[start : end - closing]
        bodies = {body[len(lead) :].strip() for lead in leads if body.startswith(lead)}
        thinks = message.get("reasoning_content", "").strip()
        if thinks or "tool_calls" in message or not content or content not in bodies:
            return False
    return True


def prove(find: Find, messages: list[Message], text: str, spans: list[Span], closing: int | list[int]) -> list[int]:
    """Prove that the spans hold what the assistant wrote, and all of it.

    Args:
        find: text and spans of other messages, found in the same way.
        closing: characters of the token that closes each turn.

    Returns:
        The indices of the messages whose reasoning the rendering does not hold.

    Raises:
        RefusedError: it cannot be proven.
    """
    planted = _Planter(secrets.token_hex(8))
    marked = [planted.message(message, i) for i, message in enumerate(messages)]
    marked_text, marked_spans = find(marked)
    if len(marked_spans) != len(spans):
        raise RefusedError("the chat template changes its turns with what they say")
    any_mark, owners = planted.any_mark, planted.owner
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    closings = closing if isinstance(closing, list) else [closing] * len(turns)
    bodies = {i: text[start : end - n] for i, (start, end), n in zip(turns, spans, closings, strict=True)}
    for i, (start, end), (marked_start, marked_end) in zip(turns, spans, marked_spans, strict=True):
        marked_span = marked_text[marked_start:marked_end]
        if any(owners[mark] != i for mark in any_mark.findall(marked_span)):
            raise RefusedError("the chat template writes one message into another's turn")
        if any_mark.sub("", marked_span) != text[start:end]:
            raise RefusedError("the chat template changes {} in a way that hides who wrote what", i)
    everywhere = any_mark.findall(marked_text)
    within = sum(len(any_mark.findall(marked_text[start:end])) for start, end in marked_spans)
    if sum(messages[owners[mark]]["role"] == "assistant" for mark in everywhere) != within:
        raise RefusedError("the chat template writes an assistant's text outside its turn")
    for mark in sorted(planted.required.difference(everywhere), key=lambda mark: owners[mark]):
        raise RefusedError("the chat template leaves out a part of {}", owners[mark])
    for i, message in enumerate(messages):
        for said in _said(message):
            if not _holds(bodies.get(i, text), said):
                raise RefusedError("the chat template leaves out or changes a part of {}", i)
    seen, lost = set(everywhere), []
    for i in turns:
        thought, marks = thought_of(messages[i]), planted.reasoning.get(i)
        # Without a mark, an answer that holds the same characters must not be taken for it.
        body = bodies[i] if marks else _before_answer(bodies[i], messages[i])
        if thought and not (_holds(body, thought) and seen.issuperset(marks or ())):
            lost.append(i)
    return lost


def thought_of(message: Message) -> str:
    """The reasoning of an assistant message, whether it stands beside its text or in it."""
    parts = _parts(message["content"])
    return message.get("reasoning_content", "").strip() or (parts[1].strip() if parts else "")


def _before_answer(body: str, message: Message) -> str:
    parts = _parts(message["content"])
    answer = (parts[2] if parts else message["content"]).strip()
    return body[: body.rfind(answer)] if answer and answer in body else body


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


def _parts(content: str) -> tuple[str, str, str] | None:
    """(what comes before the tag that opens reasoning, the reasoning, the answer) of a text that holds all three."""
    end = content.rfind("</think>")
    if end < 0:
        return None
    begin = content.find("<think>", 0, end)
    return content[: max(begin, 0)], content[begin + len("<think>") if begin >= 0 else 0 : end], content[end + 8 :]


def _said(message: Message) -> Iterator[str]:
    """The texts that the rendering must hold: all but reasoning, and arguments in which a mark is planted."""
    parts = _parts(message["content"]) if message["role"] == "assistant" else None
    yield from (parts[0], parts[2]) if parts else (message["content"],)
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        yield from _keys(arguments)
        yield from (text for text in strings(arguments) if not _last_word(text))


def _keys(value: Any) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield key
        yield from _keys(item)
    for item in value if isinstance(value, list) else ():
        yield from _keys(item)


def _last_word(text: str) -> re.Match[str] | None:
    words = [match for match in WORD.finditer(text, max(0, len(text) - PLANTING_CHARS)) if match[0][0] != "<"]
    return words[-1] if words else None


def _holds(text: str, said: str) -> bool:
    """Whether a rendering holds a text, as it is or as a JSON string."""
    said = said.strip()
    return said in text or any(json.dumps(said, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


@dataclass
class _Planter:
    """Copies messages with a mark in each text, and remembers which mark is whose.

    Attributes:
        owner: mark -> index of its message.
        required: marks that the rendering must show.
        reasoning: index of a message -> the marks in its reasoning.
    """

    key: str
    owner: dict[str, int] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    reasoning: dict[int, set[str]] = field(default_factory=dict)

    @property
    def any_mark(self) -> re.Pattern[str]:
        return re.compile(f"{self.key}x[0-9]+x[0-9]+z")

    def message(self, message: Message, index: int) -> Message:
        content, copy = message["content"], {**message}
        parts = _parts(content) if message["role"] == "assistant" else None
        if parts:
            before, thought, after = parts
            opening = content[len(before) : content.rfind("</think>") - len(thought)]
            before, thought = self._text(before, index), self._text(thought, index, reasoning=True)
            copy["content"] = f"{before}{opening}{thought}</think>{self._text(after, index)}"
        else:
            copy["content"] = self._text(content, index)
        if "reasoning_content" in message:
            copy["reasoning_content"] = self._text(message["reasoning_content"], index, reasoning=True)
        if "tool_calls" in message:
            copy["tool_calls"] = [
                {**call, "function": self._tree(call["function"], index)} for call in message["tool_calls"]
            ]
        return copy

    def _tree(self, value: Any, index: int) -> Any:
        if isinstance(value, str):
            return self._text(value, index)
        if isinstance(value, dict):
            return {key: self._tree(item, index) for key, item in value.items()}
        return [self._tree(item, index) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, index: int, reasoning: bool = False) -> str:
        """Plant behind the first character of the last word, where no tag, and no test of a text's ends, is hurt."""
        word = _last_word(text)
        if not word:
            return text
        mark = f"{self.key}x{index}x{len(self.owner)}z"
        self.owner[mark] = index
        if reasoning:
            self.reasoning.setdefault(index, set()).add(mark)
        else:
            self.required.add(mark)
        at = word.start() + 1
        return text[:at] + mark + text[at:]
