"""A prompt and its answer in columns of text (Alpaca, prompt/completion, question/answer), and agent traces.

The columns of text that make up the prompt are joined with a newline, as LLaMA-Factory and ms-swift do. A prompt or a
completion can also be a list of messages, as TRL has it; assistant messages in a prompt are context and not trained.
"""

from collections.abc import Sequence
from typing import Any

from megasft.data.formats.messages import read_messages
from megasft.data.formats.shape import (
    Changes,
    Message,
    Record,
    WrongShapeError,
    read_list,
    read_text,
    with_system,
    without,
)

# What people call the two; `instruction` may have an `input` (Alpaca) or a `context` (Dolly) beside it.
PROMPTS = ("instruction", "input", "context", "prompt", "question", "query", "problem", "passage")
ANSWERS = ("output", "response", "completion", "answer", "solution", "target")
BESIDE_INSTRUCTION = ("input", "context")
REASONING = ("reasoning_content", "reasoning", "thinking")


def columns(record: Record) -> tuple[list[str], list[str]]:
    """The columns of a record that could be of the prompt, and those that could be the answer."""
    return tuple([key for key in keys if record.get(key) is not None] for keys in (PROMPTS, ANSWERS))  # type: ignore[return-value]


def is_pair(record: Record) -> bool:
    """Whether a record has columns of both kinds."""
    return all(columns(record))


def read_pair(record: Record, changes: Changes) -> Record:
    """`record` with `messages` in place of its one prompt and its one answer.

    Raises:
        WrongShapeError: one of the two is missing, or there are several that could be meant.
    """
    prompts, answers = columns(record)
    if not prompts or not answers:
        missing = "answer" if prompts else "prompt"
        known = ", ".join(ANSWERS if prompts else PROMPTS)
        raise WrongShapeError(f"the {missing} is missing or null (one of {known})")
    alpaca = prompts[0] == "instruction" and len(prompts) <= 2 and set(prompts[1:]) <= set(BESIDE_INSTRUCTION)
    if len(answers) > 1 or not (len(prompts) == 1 or alpaca):
        found = ", ".join(f"`{key}`" for key in prompts + answers)
        remedy = f"name them: megasft convert IN OUT --format {'+'.join(prompts)}/{answers[0]}"
        raise WrongShapeError(f"several columns could be the prompt or the answer ({found}); {remedy}")
    return read_columns(record, prompts, answers[0], changes)


def read_columns(record: Record, prompts: Sequence[str], answer: str, changes: Changes) -> Record:
    """`record` with `messages` in place of the columns `prompts`, joined with newlines, and `answer`."""
    if "label" in record and isinstance(record["label"], bool):
        raise WrongShapeError("`label` says which answers are good (KTO); keep those with true, without the key")
    used = {*prompts, answer, "history", *REASONING}
    used |= {key for key in (*PROMPTS, *ANSWERS) if record.get(key) is None}
    rest = without(record, *used)
    asked = _prompt([record.get(key) for key in prompts], prompts, changes)
    answered = _messages(record.get(answer), answer, changes) or [
        {"role": "assistant", "content": read_text(record.get(answer), answer)}
    ]
    for key in REASONING:
        if record.get(key) is not None:
            if key in answered[-1]:
                raise WrongShapeError(f"`{key}` is given twice, beside the answer and in it")
            answered = [*answered[:-1], {**answered[-1], key: record[key]}]
            changes.note(f"`{key}` became part of the answer")
    messages = [*_history(record.get("history"), changes), *asked, *answered]
    return with_system(read_messages({**rest, "messages": messages}, changes), changes)


def read_trace(record: Record, changes: Changes, train_on: str = "last") -> Record:
    """An agent's step: `dialogue`, the messages so far, and `assistant`, the answer to them.

    Traces are often the steps of one task, each with all earlier steps in its dialogue: with `train_on` "last", earlier
    assistant messages get `"loss": false`.
    """
    dialogue, answer = record.get("dialogue"), record.get("assistant")
    if not isinstance(dialogue, list) or not all(isinstance(message, dict) for message in dialogue):
        raise WrongShapeError("`dialogue` is not a list of messages")
    if not isinstance(answer, dict) or answer.get("role", "assistant") != "assistant":
        raise WrongShapeError("`assistant` is not an object with `content` and `tool_calls`")
    if train_on == "last":
        dialogue = _as_context(dialogue, "dialogue", changes)
    rest = without(record, "dialogue", "assistant")
    return read_messages({**rest, "messages": [*dialogue, {**answer, "role": "assistant"}]}, changes)


def _prompt(values: list[Any], names: Sequence[str], changes: Changes) -> list[Message]:
    if len(values) == 1 and (messages := _messages(values[0], names[0], changes)):
        return _as_context(messages, names[0], changes)
    texts = [read_text(value, name) for value, name in zip(values, names, strict=True)]
    said = [text for text in texts if text.strip()]
    if len(said) > 1:
        changes.note(f"{' and '.join(f'`{name}`' for name in names)} joined with a newline")
    return [{"role": "user", "content": "\n".join(said)}]


def _messages(value: Any, name: str, changes: Changes) -> list[Message]:
    """`value` if it is a list of messages, [] if it is text."""
    if value is None or isinstance(value, str):
        return []
    messages = read_list(value, name, changes) if isinstance(value, list | dict) else []
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise WrongShapeError(f"`{name}` is neither text nor a list of messages with `role` and `content`")
    return messages


def _as_context(messages: list[Message], name: str, changes: Changes) -> list[Message]:
    """The same, with no assistant message to learn from."""
    if not any(message.get("role") == "assistant" for message in messages):
        return messages
    changes.note(f'assistant messages in `{name}` are context: they got "loss": false')
    return [{**one, "loss": False} if one.get("role") == "assistant" else one for one in messages]


def _history(history: Any, changes: Changes) -> list[Message]:
    """Earlier turns, as Alpaca's `history` has them: pairs of a prompt and its answer."""
    if not history:
        return []
    messages: list[Message] = []
    for i, pair in enumerate(read_list(history, "history", changes)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise WrongShapeError(f"`history[{i}]` is not a pair of a prompt and its answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": read_text(text, f"history[{i}]")})
    changes.note("`history` became earlier turns")
    return messages
