"""The turns that a model is asked to answer: prompts from the true history, and the reference answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megasft.config.schema import RunConfig
from megasft.data.account import Place
from megasft.data.conversations import Conversation, Problem, check_record
from megasft.data.records import parse_block, read_blocks
from megasft.data.template import encode
from megasft.data.tokenizer import ChatTokenizer
from megasft.evaluation.tool_calls import Call, Format, Reply, Tools, find_format, read_reply
from megasft.generation.decode import check_length
from megasft.generation.prompts import encode as encode_prompt
from megasft.messages import UserError, say_once


@dataclass(frozen=True)
class Question:
    """A turn to answer.

    Attributes:
        conversation: its number.
        turn: of the assistant, counted from 0.
        prompt: token ids of all that comes before the answer.
        text: the reference as the template writes it, without the token that ends it.
    """

    conversation: int
    turn: int
    prompt: list[int]
    text: str
    reference: Reply
    tools: Tools


@dataclass(frozen=True)
class Questions:
    """Those of some conversations, and the format in which their template writes tool calls, None if it cannot be read.

    Attributes:
        chosen: the numbers of the conversations.
        left_out: how many of their turns are not asked.
    """

    asked: list[Question]
    chosen: list[int]
    format: Format | None
    left_out: int = 0


def choose(count: int | None, conversations: int) -> list[int]:
    """The numbers of `count` conversations, evenly spaced; all without a count."""
    if count is None or count >= conversations:
        return list(range(conversations))
    return np.unique(np.linspace(0, conversations - 1, count).round().astype(int)).tolist()


def ask(
    files: Sequence[Path],
    places: Sequence[Place],
    count: int | None,
    tokenizer: ChatTokenizer,
    config: RunConfig,
    context: int,
) -> Questions:
    """A question for every supervised assistant turn of `count` conversations, each with its true history.

    The prompt is what a server would make of the messages before the turn. Turns that leave no room for an answer in
    the model's `context` are left out, which is said. Raises UserError where no turn is left.

    Args:
        places: of the conversations, sorted.
        count: None for all.
    """
    format = find_format(tokenizer)
    chosen = choose(count, len(places))
    asked, left_out, unread = list[Question](), list[str](), 0
    for number, conversation in zip(chosen, _read(files, [places[i] for i in chosen], config), strict=True):
        unread += format is None and any("tool_calls" in message for message in conversation.messages)
        for turn, at in _supervised(conversation, config):
            try:
                question = _question(number, turn, conversation, at, tokenizer, config, format)
                check_length(question.prompt, context)
                asked.append(question)
            except UserError as error:
                left_out.append(f"{conversation.file}:{conversation.line}, turn {turn + 1}: {error}")
    if unread:
        say_once(
            f"{tokenizer.source}: the chat template writes tool calls neither as Qwen3 nor as Qwen3-Coder do; those of "
            f"{unread:,} conversations are compared as text"
        )
    if left_out:
        say_once(
            f"turns that are not answered: {len(left_out):,} ({left_out[0]}{', ...' if len(left_out) > 1 else ''})"
        )
    if not asked:
        raise UserError(f"nothing to answer: {left_out[0]}")
    return Questions(asked, chosen, format, len(left_out))


def _supervised(conversation: Conversation, config: RunConfig) -> list[tuple[int, int]]:
    """(turn, its message) of the assistant's turns that training would learn from."""
    speaking = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    turns = list(enumerate(speaking))[-1 if config.data.train_on == "last" else 0 :]
    return [(turn, at) for turn, at in turns if conversation.supervised[at]]


def _question(
    number: int,
    turn: int,
    conversation: Conversation,
    at: int,
    tokenizer: ChatTokenizer,
    config: RunConfig,
    format: Format | None,
) -> Question:
    """Raises UserError where the template does not render the messages up to this turn."""
    messages, tools = conversation.messages, conversation.tools
    answered = replace(
        conversation, messages=messages[: at + 1], supervised=tuple(i == at for i in range(at + 1)), notes=Counter()
    )
    encoded = encode(answered, tokenizer, "last", config.data.parse_special_in_text, "accept")
    if isinstance(encoded, Problem):
        raise UserError(encoded.reason)
    text = tokenizer.decode(encoded.ids[encoded.mask]).rstrip()
    text = next((text.removesuffix(token) for token in tokenizer.control_tokens if text.endswith(token)), text)
    reference = read_reply(text, format, tools)
    if None in reference.calls:  # a value that holds the format's own tags
        functions = [call["function"] for call in messages[at].get("tool_calls", ())]
        reference = Reply(reference.text, tuple(Call(one["name"], one["arguments"]) for one in functions))
    prompt = encode_prompt(tokenizer, messages[:at], tools, conversation.template_args)
    return Question(number, turn, prompt, text, reference, tools)


def _read(files: Sequence[Path], places: Sequence[Place], config: RunConfig) -> list[Conversation]:
    """The conversations at these places, which are sorted and could be used."""
    found: list[Conversation] = []
    for number in sorted({place.file for place in places}):
        lines = {place.line for place in places if place.file == number}
        for block in read_blocks(files[number]):
            wanted = replace(block, lines=[line for line in block.lines if line[0] in lines])
            for line, record, begin in parse_block(wanted):
                if line in lines:
                    one = check_record(record, str(files[number]), line, begin, config.data.ignore_keys)
                    assert isinstance(one, Conversation)
                    found.append(one)
    return found
