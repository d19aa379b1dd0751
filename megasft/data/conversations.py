"""Conversations, read one at a time from JSONL (plain, .gz, .zst) and Parquet files, or a folder of them.

A record is an object with `messages` and, where there are any, `tools`; `record_keys` says what its other keys mean.
What comes out is what chat templates understand: text parts joined, a system prompt as the first message, reasoning
under one name, `arguments` as an object, tools and calls in their nested form. Nothing is guessed and nothing vanishes:
a record that is not right in every point becomes a `Problem` that names file, line and reason, what of it the model
will not see is counted in `Conversation.notes`, and reading continues behind it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasft.data.message import join_parts, read_message
from megasft.data.problems import Problem, Problems, WrongError
from megasft.data.record_keys import HARMLESS, RECORD, SYSTEM, TRAINED, UNTRAINED, check_keys
from megasft.data.records import conversation_files, read_records, visible
from megasft.data.tool_schemas import drop_null_arguments, read_tools
from megasft.data.values import check_tree

__all__ = ["Conversation", "Problem", "Problems", "check_record", "read_conversations"]

# What `chat_template_kwargs` and [data] template_args may not set: they are arguments of the rendering itself.
RESERVED_VARIABLES = (
    "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "processor_kwargs",
)  # fmt: skip


@dataclass(slots=True)
class Conversation:
    """One checked conversation. `supervised[i]` says whether message i may be trained on; only assistant messages may.

    Attributes:
        line: counts from 1: the line of a JSONL file, the row of a Parquet file.
        template_args: variables for the chat template, besides those of the run.
        notes: how often what was left out of the record, in words.
        inserted: messages in front that the record does not have in `messages`: 1 where it has a `system`.
    """

    messages: list[dict[str, Any]]
    supervised: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    file: str = ""
    line: int = 0
    template_args: dict[str, Any] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    inserted: int = 0


def read_conversations(path: str | Path, ignore_keys: Iterable[str] = ()) -> Iterator[Conversation | Problem]:
    """Yield every record of a file, or of a folder's files in sorted order, as a `Conversation` or a `Problem`.

    Holds one line (64 MiB at most) or one small batch of Parquet rows in memory. A file without any record is a
    `Problem`.

    Raises:
        UserError: `path` is missing, unreadable, or holds no file of a known kind.
    """
    for file in conversation_files(path):
        empty = True
        for line, record, begin in read_records(file):
            empty = False
            yield check_record(record, str(file), line, begin, ignore_keys)
        if empty:
            yield Problem(str(file), 1, "the file holds no conversation")


def check_record(
    record: dict[str, Any] | str, file: str, line: int, begin: bytes = b"", ignore_keys: Iterable[str] = ()
) -> Conversation | Problem:
    """The conversation that a record stands for; a `str` says why there is none.

    Args:
        begin: its first bytes, for the excerpt of a problem.
        ignore_keys: keys, at any place of a record, that are passed over and counted though they may carry meaning.
    """
    try:
        if isinstance(record, str):
            raise WrongError(record)
        conversation = _conversation(record, ignore_keys)
    except WrongError as wrong:
        excerpt = wrong.excerpt or visible(begin.decode("utf-8", "replace").strip())
        return Problem(file, line, wrong.reason, excerpt)
    conversation.file, conversation.line = file, line
    return conversation


# --- checks ----------------------------------------------------------------------------------------------------------


def _conversation(record: dict[str, Any], ignored: Iterable[str]) -> Conversation:
    raw = record.get("messages")
    if not isinstance(raw, list) or not raw:
        raise WrongError("`messages` is missing or empty" if not raw else "`messages` is not a list")
    notes: Counter[str] = Counter()
    messages: list[dict[str, Any]] = []
    supervised: list[bool] = []
    owed = 0  # tool replies that the last assistant turn still waits for
    for i, one in enumerate(raw):
        where = f"messages[{i}]"
        message, says = read_message(one, where, notes, ignored)
        role = message["role"]
        trained = role == "assistant" and says is not False
        if role == "tool" and not any(before["role"] == "assistant" for before in messages):
            raise WrongError(f"{where}: this tool reply answers nobody: no assistant message comes before it", one)
        if role == "tool" and owed == 0:
            notes["tool replies that answer no tool call (kept)"] += 1
        owed = _owed(message, owed)
        if trained and not any(before["role"] == "user" for before in messages):
            raise WrongError(f"{where}: an assistant message to learn from needs a user message before it", one)
        if trained and not (message["content"].strip() or "tool_calls" in message):
            raise WrongError(f"{where}: the assistant says nothing", one)
        messages.append(message)
        supervised.append(trained)
    if not any(supervised):
        raise WrongError("nothing to learn from: no assistant message with `loss` on")
    said = {message["content"].strip() for message in messages}
    _check_record_keys(record, notes, ignored, said)
    system = _system(record, messages[0], notes, ignored)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
        supervised.insert(0, False)
    tools = read_tools(record, notes)
    drop_null_arguments(messages, tools, notes)
    variables = _template_args(record.get("chat_template_kwargs"))
    return Conversation(messages, tuple(supervised), tools, "", 0, variables, notes, int(system is not None))


def _owed(message: dict[str, Any], owed: int) -> int:
    """Tool replies that are still to come after `message`. Calls may be written into the text, as Hermes does."""
    if message["role"] == "assistant":
        return len(message.get("tool_calls", ())) or message["content"].count("<tool_call>")
    return max(0, owed - 1) if message["role"] == "tool" else owed


def _check_record_keys(record: dict[str, Any], notes: Counter[str], ignored: Iterable[str], said: set[str]) -> None:
    """The keys at the top: a switch for the loss of the whole record is one only where it changes nothing."""
    switches = [key for key in (*TRAINED, *UNTRAINED) if record.get(key) is not None]
    for key in switches:
        value = record[key]
        if key not in ignored and not (isinstance(value, int | float) and value == (key in TRAINED)):
            raise WrongError(
                f"`{key}` at the top of a record is not read; write `loss` into its assistant messages, give a file "
                f"its weight in [[data.mix]], or pass over it with [data] ignore_keys = [{key!r}]",
                value,
            )
    table = RECORD | dict.fromkeys(switches, HARMLESS)
    check_keys(record, table, "", notes, ignored, said)


def _system(record: dict[str, Any], first: dict[str, Any], notes: Counter[str], ignored: Iterable[str]) -> str | None:
    """The system prompt at the top of a record; None where `messages` has it, or nothing does."""
    found = {key: record[key] for key in SYSTEM if record.get(key) not in (None, "", [])}
    texts = {key: join_parts(value, f"`{key}`", notes, ignored) for key, value in found.items()}
    texts = {key: text for key, text in texts.items() if text.strip()}
    if not texts:
        return None
    key, text = next(iter(texts.items()))
    other = next((other for other, theirs in texts.items() if theirs.strip() != text.strip()), None)
    if other:
        raise WrongError(f"`{key}` and `{other}` contradict each other", texts[other])
    if first["role"] not in ("system", "developer"):
        return text
    if first["content"].strip() != text.strip():
        raise WrongError(f"`{key}` and the {first['role']} message in messages[0] contradict each other", text)
    return None


def _template_args(variables: Any) -> dict[str, Any]:
    if variables in (None, "", {}):
        return {}
    if not isinstance(variables, dict):
        raise WrongError("`chat_template_kwargs` is not an object", variables)
    check_tree(variables, "chat_template_kwargs")
    if reserved := next((name for name in variables if name in RESERVED_VARIABLES), None):
        raise WrongError(f"`chat_template_kwargs` sets `{reserved}`, which belongs to the rendering itself", variables)
    return {name: value for name, value in variables.items() if value is not None}
