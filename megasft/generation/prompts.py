"""Where prompts come from: a text, a chat on the terminal, a file of conversations. For rank 0."""

import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasft.data.assistant_spans import map_strings, strings
from megasft.data.conversations import Problem, check_record
from megasft.data.records import conversation_files, read_records, visible
from megasft.data.tokenizer import STAND_IN, ChatTokenizer
from megasft.generation.request import Request, read_tools
from megasft.messages import UserError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Answer:
    """What came back for a prompt; `finish` is "stop", "length" or "interrupted"."""

    text: str
    tokens: int
    finish: str


# Yields messages and their tools, takes the answer to them.
Prompts = Generator[tuple[Messages, Tools], Answer, None]


def is_chat(request: Request) -> bool:
    """Whether prompts are typed on a terminal, one after the other."""
    return request.prompt is None and request.jsonl is None and sys.stdin.isatty()


def prompts(request: Request) -> Prompts:
    """The prompts of a request. Raises UserError for one that cannot be used."""
    if request.jsonl is not None:
        return _from_file(request, request.jsonl)
    return _chat(request) if is_chat(request) else _once(request)


def encode(tokenizer: ChatTokenizer, messages: Messages, tools: Tools, template: dict[str, Any]) -> list[int]:
    """The tokens of a conversation up to where the assistant begins, as in training: control tokens in texts are text.

    Raises UserError if the chat template does.
    """
    texts: Any = [messages, tools]
    guarded = any(tokenizer.control.search(text) for text in strings(texts))
    if guarded and any(STAND_IN.search(text) for text in strings(texts)):
        raise UserError("the prompt holds both control tokens and the private characters that stand for them")
    if guarded:
        messages, tools = map_strings(texts, tokenizer.swap)
    try:
        text = tokenizer.render(messages, tools, generation_prompt=True, **template)
    except Exception as error:  # a template is a program: it may raise anything, on purpose or not
        reason = visible(str(error) or type(error).__name__, 160)
        raise UserError(f"{tokenizer.source}: the chat template fails: {reason}") from None
    return tokenizer.encode([tokenizer.swap(text) if guarded else text], guarded)[0].ids


def write(text: str) -> None:
    """To standard output, at once. Raises UserError if nobody reads it any more."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise UserError("standard output was closed before the answer was whole") from None


def _once(request: Request) -> Prompts:
    text = sys.stdin.read() if request.prompt is None else request.prompt
    if not text.strip():
        raise UserError("no prompt: give --prompt TEXT, or a text on standard input, or chat on a terminal")
    yield [*_system(request), {"role": "user", "content": text}], read_tools(request.tools)


def _chat(request: Request) -> Prompts:
    import readline  # noqa: F401 (lines can be edited from here on)

    tools, messages = read_tools(request.tools), _system(request)
    print("A line is a message; /new begins a new conversation, Ctrl-C ends an answer, Ctrl-D the chat.")
    while True:
        try:
            write("\n")
            line = input("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            raise
        if line == "/new":
            messages = _system(request)
        elif line:
            answer = yield [*messages, {"role": "user", "content": line}], tools
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer.text}]


def _from_file(request: Request, path: Path) -> Prompts:
    """Conversations as for training; an assistant message at the end is what was expected, and is not shown."""
    tools, system = read_tools(request.tools), _system(request)
    for file in conversation_files(path):
        for line, record, begin in read_records(file):
            if isinstance(record, dict) and isinstance(messages := record.get("messages"), list) and messages:
                last = messages[-1]
                if not (isinstance(last, dict) and last.get("role") == "assistant"):
                    record = record | {"messages": [*messages, {"role": "assistant", "content": "?"}]}
            found = check_record(record, str(file), line, begin)
            if isinstance(found, Problem):
                raise UserError(str(found))
            asked = found.messages[:-1]
            if system and asked[0]["role"] != "system":
                asked = system + asked
            answer = yield asked, found.tools or tools
            written: dict[str, Any] = {"messages": [*asked, {"role": "assistant", "content": answer.text}]}
            written |= {"tools": found.tools} if found.tools else {}
            written |= {"finish": answer.finish, "new_tokens": answer.tokens}
            write(json.dumps(written, ensure_ascii=False) + "\n")


def _system(request: Request) -> Messages:
    return [] if request.system is None else [{"role": "system", "content": request.system}]
