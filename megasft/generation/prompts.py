"""The sources of prompts: an option, standard input, a chat on the terminal, a file of conversations. For rank 0."""

import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasft.data.conversations import Problem, check_record
from megasft.data.records import conversation_files, read_records, visible
from megasft.data.rendering_proof import map_strings, strings
from megasft.data.tokenizer import STAND_IN, ChatTokenizer
from megasft.generation.request import Request, read_tools
from megasft.messages import UserError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt; `finish` is "stop", "length" or "interrupted"."""

    text: str
    tokens: int
    finish: str


# Yields messages, their tools and their own variables of the chat template, and is sent the answer.
Prompts = Generator[tuple[Messages, Tools, dict[str, Any]], Answer, None]


def is_chat(request: Request) -> bool:
    """Whether prompts are typed on a terminal."""
    return request.prompt is None and request.jsonl is None and sys.stdin.isatty()


def prompts(request: Request) -> Prompts:
    """The prompts of a request. Raises UserError for an unusable one."""
    if request.jsonl is not None:
        return _from_file(request, request.jsonl)
    return _chat(request) if is_chat(request) else _once(request)


def encode(tokenizer: ChatTokenizer, messages: Messages, tools: Tools, template: dict[str, Any]) -> list[int]:
    """The tokens of a conversation up to the start of the assistant's turn. As in training, control tokens in texts are
    plain text. Raises UserError if the chat template raises.
    """
    texts: Any = [messages, tools]
    guarded = any(tokenizer.control.search(text) for text in strings(texts))
    if guarded and any(STAND_IN.search(text) for text in strings(texts)):
        raise UserError(
            "the prompt contains control tokens and also the private-use characters (U+10F000 and above) that megasft "
            "puts in their place; remove one of the two"
        )
    if guarded:
        messages, tools = map_strings(texts, tokenizer.swap)
    try:
        text = tokenizer.render(messages, tools, generation_prompt=True, **template)
    except Exception as error:  # a template is a program: it may raise anything, on purpose or not
        reason = visible(str(error) or type(error).__name__, 160)
        raise UserError(f"{tokenizer.source}: the chat template fails: {reason}") from None
    return tokenizer.encode([tokenizer.swap(text) if guarded else text], guarded)[0].ids


def write(text: str) -> None:
    """Print to standard output without buffering. Raises UserError if it is closed."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise UserError("standard output was closed before the answer was complete") from None


def _once(request: Request) -> Prompts:
    text = sys.stdin.read() if request.prompt is None else request.prompt
    if not text.strip():
        raise UserError("no prompt: give --prompt TEXT, pipe a text to standard input, or chat on a terminal")
    yield [*_system(request), {"role": "user", "content": text}], read_tools(request.tools), {}


def _chat(request: Request) -> Prompts:
    import readline  # noqa: F401 (gives input() line editing)

    tools, messages = read_tools(request.tools), _system(request)
    print("Each line is a message. /new starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends the chat.")
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
            answer = yield [*messages, {"role": "user", "content": line}], tools, {}
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer.text}]


def _from_file(request: Request, path: Path) -> Prompts:
    for prompt in file_prompts(request, path):
        prompt.write((yield prompt.messages, prompt.tools, prompt.template))


@dataclass(frozen=True)
class FilePrompt:
    """A conversation of a file up to the turn to answer; `own_tools` are those of its record."""

    messages: Messages
    tools: Tools
    template: dict[str, Any]
    own_tools: Tools

    def write(self, answer: Answer) -> None:
        """Print the conversation with its answer as a JSON line."""
        written: dict[str, Any] = {"messages": [*self.messages, {"role": "assistant", "content": answer.text}]}
        written |= {"tools": self.own_tools} if self.own_tools else {}
        written |= {"finish": answer.finish, "new_tokens": answer.tokens}
        write(json.dumps(written, ensure_ascii=False) + "\n")


def file_prompts(request: Request, path: Path) -> Iterator[FilePrompt]:
    """Conversations as for training; a last assistant message is the reference, which the model does not see."""
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
            yield FilePrompt(asked, found.tools or tools, found.template_args, found.tools)


def _system(request: Request) -> Messages:
    return [] if request.system is None else [{"role": "system", "content": request.system}]
