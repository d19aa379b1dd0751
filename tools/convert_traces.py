"""Turn agent traces into conversations: `python tools/convert_traces.py TRACES OUTPUT.jsonl`.

A trace is an object with `dialogue`, the messages so far, and `assistant`, the answer to them: an object with `content`
and `tool_calls`. It becomes one line with `messages` (and `tools`, if the trace has any); tool calls stay structured,
their arguments an object. Traces are often the steps of one task, each with all earlier steps in its dialogue, so only
the answer is trained on unless told otherwise: earlier assistant messages get `"loss": false`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megasft.data.conversations import Conversation, Problem, check_record
from megasft.data.records import conversation_files, read_records
from megasft.messages import UserError


def convert(traces: Path, output: Path, train_on: Literal["all", "last"] = "last") -> tuple[int, list[Problem]]:
    """Write a line for every good trace; return how many there are, and what is wrong with the others.

    `output` appears when it is complete.

    Raises:
        UserError: `traces` cannot be read or `output` cannot be written.
    """
    written, problems = 0, []
    partial = output.with_name(output.name + ".partial")
    files = conversation_files(traces)
    if output.exists() and any(output.samefile(file) for file in files):
        raise UserError(f"{output}: is one of the traces; write to another file")
    try:
        with partial.open("w", encoding="utf-8") as lines:
            for file in files:
                for number, trace, begin in read_records(file, ("dialogue", "assistant", "tools")):
                    record = trace if isinstance(trace, str) else _record(trace, train_on)
                    checked = check_record(record, str(file), number, begin)
                    if isinstance(checked, Problem):
                        problems.append(checked)
                    else:
                        lines.write(json.dumps(_line(checked), ensure_ascii=False) + "\n")
                        written += 1
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    return written, problems


def _record(trace: dict[str, Any], train_on: str) -> dict[str, Any] | str:
    dialogue, answer = trace.get("dialogue"), trace.get("assistant")
    if not isinstance(dialogue, list) or not all(isinstance(message, dict) for message in dialogue):
        return "`dialogue` is not a list of messages"
    if not isinstance(answer, dict) or answer.get("role", "assistant") != "assistant":
        return "`assistant` is not an object with `content` and `tool_calls`"
    if train_on == "last":
        dialogue = [{**turn, "loss": False} if turn.get("role") == "assistant" else turn for turn in dialogue]
    return {"messages": [*dialogue, {**answer, "role": "assistant"}], "tools": trace.get("tools")}


def _line(conversation: Conversation) -> dict[str, Any]:
    """The checked conversation as one line of a dataset."""
    messages = []
    for message, supervised in zip(conversation.messages, conversation.supervised, strict=True):
        unsupervised = message["role"] == "assistant" and not supervised
        messages.append({**message, "loss": False} if unsupervised else message)
    return {"messages": messages} | ({"tools": conversation.tools} if conversation.tools else {})


def main(
    traces: Annotated[Path, typer.Argument(help="A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a folder.")],
    output: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    train_on: Annotated[
        str, typer.Option(help="`last`: the answer only; `all`: earlier assistant turns too.")
    ] = "last",
) -> None:
    """Turn agent traces into conversations. Exits with 1 if a trace was left out, 2 if nothing could be done."""
    try:
        if train_on not in ("all", "last"):
            raise UserError(f"--train-on {train_on}: give `all` or `last`")
        written, problems = convert(traces, output, "all" if train_on == "all" else "last")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{written} conversations written to {output}, {len(problems)} traces left out")
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    typer.run(main)
