"""Which characters of a rendered conversation did the assistant write?

1. `learn_frame` renders a tiny conversation once per tokenizer and reads off what the template writes around an
   assistant turn: the header (`<|im_start|>assistant\\n`) and the token that closes the turn (`<|im_end|>`).
2. Turn i starts behind the i-th header. Messages hold no control tokens when they are rendered (see `tokenizer.py`), so
   no message can forge one. Where a template has no constant header, the turn starts where the generation prompt of
   the messages before it ends, if that text is a prefix of the whole.
3. The finding is then proven for this conversation (`rendering_proof`).
4. A template may say itself what the assistant wrote, with `{% generation %}` marks. They are believed as far as the
   finding bears them out: they may leave out what the template puts before a turn, and nothing else. Where nothing is
   found, they are proven by themselves.

Rendering whole conversations keeps this right for templates that rewrite earlier turns (Qwen3 removes their thinking).
What cannot be proven is refused.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megasft.data.rendering_proof import Message, RefusedError, Span, Tools, is_plain, prove, strings

if TYPE_CHECKING:
    from megasft.data.tokenizer import ChatTokenizer

MARKS_INCOMPLETE = "turns of which the template's generation marks leave out a part (trained in full all the same)"


class FrameError(Exception):
    """The template does not write turns in a way that can be told apart."""


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


@dataclass
class Turns:
    """A rendered conversation.

    Attributes:
        spans: for each assistant message in order, the characters [start, end) it wrote. The token that closes a turn
            belongs to it. A turn of which the template leaves nothing (an earlier one that was all reasoning) has an
            empty span: nobody should learn to say nothing.
        lost_reasoning: indices of the messages whose reasoning is not in the text.
        marks_incomplete: how many turns the template's own marks would not have covered.
    """

    text: str
    spans: list[Span]
    lost_reasoning: list[int] = field(default_factory=list)
    marks_incomplete: int = 0


def assistant_turns(
    tokenizer: "ChatTokenizer", messages: list[Message], tools: Tools, variables: dict[str, Any]
) -> Turns:
    """What the assistant wrote. `messages` and `tools` must hold no control tokens.

    Args:
        variables: of the chat template, besides the tokenizer's own.

    Raises:
        RefusedError: it cannot be proven, or the template leaves out a text, a call or a tool.
        Exception: the template's own.
    """
    marks = tokenizer.generation_marks(messages, tools, **variables)
    try:
        turns = _found(tokenizer, messages, tools, variables)
    except RefusedError as refused:
        if marks is None:
            raise
        try:
            turns = _marked(tokenizer, messages, tools, variables, *marks)
        except RefusedError:
            if tokenizer.frame is None:
                raise
            raise refused from None
    else:
        if marks is not None and tokenizer.frame:
            _believe(turns, marks[1], tokenizer.frame.leads)
    if tools:
        _check_tools(tokenizer, messages, tools, variables, turns.text)
    bodies = [turns.text[start : end - _closing(tokenizer, turns.text, end)] for start, end in turns.spans]
    spans = zip(turns.spans, bodies, strict=True)
    turns.spans = [(start, end) if body.strip() else (end, end) for (start, end), body in spans]
    return turns


# --- found by the frame ----------------------------------------------------------------------------------------------


def _found(tokenizer: "ChatTokenizer", messages: list[Message], tools: Tools, variables: dict[str, Any]) -> Turns:
    frame = tokenizer.frame
    if frame is None:
        raise RefusedError(f"{tokenizer.frame_error}; mark the assistant's text in it with {{% generation %}}")

    def find(messages: list[Message]) -> tuple[str, list[Span]]:
        return _find(tokenizer, frame, messages, tools, variables)

    text, spans = find(messages)
    turns, closing = Turns(text, spans), len(frame.terminator)
    if not is_plain(messages, text, spans, frame.leads, closing):
        turns.lost_reasoning = prove(find, messages, text, spans, [closing] * len(spans))
    return turns


def _find(
    tokenizer: "ChatTokenizer", frame: Frame, messages: list[Message], tools: Tools, variables: dict[str, Any]
) -> tuple[str, list[Span]]:
    text = tokenizer.render(messages, tools, **variables)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    starts = []
    if tokenizer.control.search(frame.header):
        starts = [match.end() for match in re.finditer(re.escape(frame.header), text)]
    if len(starts) != len(turns):
        prompts = [
            tokenizer.render(messages[:i], tools, generation_prompt=True, **variables) if i else "" for i in turns
        ]
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


# --- marked by the template ------------------------------------------------------------------------------------------


def _believe(turns: Turns, marks: list[Span], leads: tuple[str, ...]) -> None:
    """Let marks take from the beginning of a turn what the template put there; count turns they do not cover."""
    joined: list[Span] = []
    for start, end in sorted(mark for mark in marks if mark[0] < mark[1]):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    spans = []
    for start, end in turns.spans:
        mark = next((mark for mark in joined if start <= mark[0] < end <= mark[1]), None)
        skipped = turns.text[start : mark[0]] if mark else ""
        if mark is None or (skipped.strip() and skipped not in leads):
            turns.marks_incomplete += 1
        spans.append((start + len(skipped), end) if skipped in leads else (start, end))
    turns.spans = spans


def _marked(
    tokenizer: "ChatTokenizer",
    messages: list[Message],
    tools: Tools,
    variables: dict[str, Any],
    text: str,
    marks: list[Span],
) -> Turns:
    """The turns by the template's marks alone, which are held to the same proof."""
    count = sum(message["role"] == "assistant" for message in messages)
    if len(marks) != count:
        raise RefusedError("the template's generation marks are not one for each assistant message")

    def trimmed(text: str, spans: list[Span]) -> list[Span]:
        return [(start, start + len(text[start:end].rstrip())) for start, end in spans]

    def find(messages: list[Message]) -> tuple[str, list[Span]]:
        found = tokenizer.generation_marks(messages, tools, **variables)
        assert found is not None
        return found[0], trimmed(*found)

    spans = trimmed(text, marks)
    closings = [_closing(tokenizer, text, end) for _, end in spans]
    if not all(closings):
        raise RefusedError("the template's generation marks leave out the token that closes a turn")
    if any(tokenizer.control.search(text, start, end - n) for (start, end), n in zip(spans, closings, strict=True)):
        raise RefusedError("the template's generation marks enclose more than a turn")
    return Turns(text, spans, prove(find, messages, text, spans, closings))


def _closing(tokenizer: "ChatTokenizer", text: str, end: int) -> int:
    """Characters of the control token that ends at `end`, 0 if none does."""
    return next((len(token) for token in tokenizer.control_tokens if text.endswith(token, 0, end)), 0)


# --- tools -----------------------------------------------------------------------------------------------------------


def _check_tools(
    tokenizer: "ChatTokenizer",
    messages: list[Message],
    tools: list[dict[str, Any]],
    variables: dict[str, Any],
    text: str,
) -> None:
    """Raise RefusedError unless the name of every tool stands in the rendering, besides where messages have it."""
    names = [tool["function"]["name"] for tool in tools]
    said = "\n".join(strings(messages))
    called = Counter(call["function"]["name"] for message in messages for call in message.get("tool_calls", ()))
    for name in names:
        quoted = (f'"{name}"', f">{name}<")
        if not any(text.count(one) > said.count(one) + called[name] for one in quoted):
            break
    else:
        return
    key = secrets.token_hex(8)
    planted = [
        {**tool, "function": {**tool["function"], "name": f"{name}{key}x{i}z"}}
        for i, (tool, name) in enumerate(zip(tools, names, strict=True))
    ]
    shown = tokenizer.render(messages, planted, **variables)
    lost = next((name for i, name in enumerate(names) if f"{key}x{i}z" not in shown), None)
    if lost is not None:
        raise RefusedError(
            f"the chat template has no place for `tools` (the rendering does not name {lost!r}); use a template that "
            "has, or describe the tools in the system prompt and remove `tools`"
        )
