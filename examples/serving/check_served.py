"""Serve a run's model and adapter over HTTP, ask prompts, and compare with the tokens that megasft itself generates.

    .venv/bin/python examples/serving/check_served.py runs/demo demo/data/validation.jsonl

The servers are vLLM and llama.cpp on CPUs, in an environment of their own (`make .venv-serving/installed`): the base,
the base with the adapter, and the merged model, all greedy and in fp32. A conversation of plain texts is asked by its
messages (/v1/chat/completions), so that the server's template and tokenizer take part; one with tools, or where the
server lacks the tokenizer, by its token ids (/v1/completions). Exit code 1 if any token differs.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__":
    from megasft.messages import quieten_libraries

    quieten_libraries()

import torch
import typer
from engines import Prompt, Reply, Served, llama_cpp, vllm
from rich.console import Console
from rich.table import Table
from server import ServerFailed, serving

from megasft import host

host.import_megatron()

from megasft.adapters.adapter_file import AdapterFile
from megasft.adapters.export import export_adapter
from megasft.adapters.merge import merge_adapter
from megasft.config.parallelism import TopologySettings, resolve_topology
from megasft.data.conversations import Problem, check_record
from megasft.data.records import conversation_files, read_records
from megasft.data.tokenizer import load_tokenizer
from megasft.distributed.topology import join_world
from megasft.generation.decode import generate
from megasft.generation.prompts import encode
from megasft.generation.text import stop_tokens
from megasft.job import load_model
from megasft.messages import UserError, say, say_once
from megasft.model.hf_config import read_config
from megasft.model.hub import find_model
from megasft.target import Target, find_target

NOT_RUN = "Not run: SGLang (its CPU build is compiled from source, docs/rl.md); anything on a GPU."


@dataclass
class Row:
    """A served model, and how its answers compare with those of megasft."""

    server: str
    model: str
    asked_by: str = ""
    answers: int = 0
    equal: int = 0
    tokens: int = 0
    first: str = ""  # difference

    def add(self, number: int, prompt: Prompt, reply: Reply, expected: list[int], stop: frozenset[int]) -> None:
        """Count one answer. Servers differ in whether they report the token that ends an answer."""
        ends = bool(expected) and expected[-1] in stop
        wanted = expected[:-1] if ends else expected
        found = reply.tokens[:-1] if reply.tokens and reply.tokens[-1] in stop else reply.tokens
        problem = ""
        if reply.prompt_tokens != len(prompt.ids):
            problem = f"its prompt has {reply.prompt_tokens} tokens, not {len(prompt.ids)}"
        elif found != wanted:
            equal = [mine == theirs for mine, theirs in zip(wanted, found, strict=False)]
            problem = f"token {[*equal, False].index(False) + 1} differs"
        elif (reply.finish == "stop") != ends:
            problem = f"it ended by {reply.finish}"
        self.answers, self.tokens = self.answers + 1, self.tokens + len(expected)
        self.equal += not problem
        self.first = self.first or (problem and f"answer {number}: {problem}")
        self.asked_by = reply.asked_by if self.asked_by in ("", reply.asked_by) else "messages, token ids"


def main(
    target: Annotated[str, typer.Argument(help="a run directory, run file, or the folder of an adapter")],
    data: Annotated[Path, typer.Argument(help="a file of conversations; the last answer of each is left out")],
    prompts: Annotated[int, typer.Option(min=1, help="conversations to ask")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 32,
    only: Annotated[str, typer.Option(help="vllm or llama.cpp; both without it")] = "",
    python: Annotated[Path, typer.Option(help="of the servers' environment")] = Path(".venv-serving/bin/python"),
    logs: Annotated[Path, typer.Option(help="the folder for the servers' logs")] = Path("runs/served"),
) -> None:
    """Ask every server, print a table, and fail where a token differs."""
    try:
        if only not in ("", "vllm", "llama.cpp"):
            raise UserError(f"--only {only}: must be vllm or llama.cpp")
        if not python.exists():
            raise UserError(f"--python {python}: no such file; make .venv-serving/installed installs the servers")
        with tempfile.TemporaryDirectory(prefix="megasft-served-") as folder:
            rows = check(find_target(target), data, prompts, max_new_tokens, only, python, logs, Path(folder))
    except UserError as error:
        say(str(error))
        raise typer.Exit(2) from None
    except ServerFailed as error:
        say(str(error), error.log)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say("interrupted; no server is left")
        raise typer.Exit(130) from None
    show(rows)
    if any(row.equal < row.answers for row in rows):
        raise typer.Exit(1)


def check(
    target: Target, data: Path, count: int, max_new_tokens: int, only: str, python: Path, logs: Path, folder: Path
) -> list[Row]:
    """The answers of every server against those of megasft. `folder` takes what is made for the servers."""
    if target.adapter is None:
        raise UserError(f"{target.model}: neither a run directory nor an adapter; name one of them")
    model = find_model(target.model)
    stop = stop_tokens(model, read_config(model), load_tokenizer(model))
    asked = read_prompts(model, data, count, target.config.data.template_args if target.config else {})
    expected = {
        "base": generated(str(model), None, asked, max_new_tokens, stop),
        "base + adapter": generated(str(model), target.adapter, asked, max_new_tokens, stop),
    }
    if expected["base"] == expected["base + adapter"]:
        raise UserError(f"{target.adapter}: changes none of these answers, which would show nothing; raise --prompts")
    context = max(len(prompt.ids) for prompt in asked) + max_new_tokens
    rows = []
    logs.mkdir(parents=True, exist_ok=True)
    for served in to_serve(str(model), target.adapter, only, python, folder, -(-context // 256) * 256):
        log, started = logs / f"{served.name.replace(' ', '-')}.log", time.monotonic()
        say_once(f"{served.name} starts; its log is {log}")
        with serving(served.name, served.command, log) as server:
            say_once(f"ready after {time.monotonic() - started:.0f} s")
            for title in served.models:
                row = Row(served.engine, title)
                answers = expected["base" if title == "base" else "base + adapter"]
                for number, (prompt, tokens) in enumerate(zip(asked, answers, strict=True), 1):
                    row.add(number, prompt, served.ask(server, title, prompt, max_new_tokens), tokens, stop)
                rows.append(row)
    return rows


def to_serve(model: str, adapter: str, only: str, python: Path, folder: Path, context: int) -> list[Served]:
    """The servers to start, with the merged model made in `folder`, and the adapter in the layout that they read."""
    file, merged = AdapterFile(adapter), folder / "merged"
    rank = file.settings().r
    if file.fused or file.config.get("use_rslora"):  # vLLM reads no fused one, llama.cpp takes alpha / r for scaling
        export_adapter(adapter, folder / "per-expert", base_model=model)
        adapter = str(folder / "per-expert")
    merge_adapter(model, adapter, merged, dtype="fp32")
    if file.routers():
        say_once("the adapter has LoRA of the router, which vLLM does not apply: there only the merged model has it")
    found = []
    if only != "llama.cpp":
        found += vllm(python, model, "" if file.routers() else adapter, str(merged), rank, context)
    if only != "vllm":
        found += llama_cpp(python, model, adapter, str(merged), folder, context)
    return found


def read_prompts(model: Path, data: Path, count: int, run_template: dict[str, Any]) -> list[Prompt]:
    """The first conversations of a file, without their last answer. Raises UserError."""
    tokenizer, prompts = load_tokenizer(model), []
    records = ((file, *found) for file in conversation_files(data) for found in read_records(file))
    for file, line, record, begin in islice(records, count):
        conversation = check_record(record, str(file), line, begin)
        if isinstance(conversation, Problem):
            raise UserError(str(conversation))
        messages, tools = conversation.messages[:-1], conversation.tools or None
        template = run_template | conversation.template_args
        ids = encode(tokenizer, messages, tools, template)
        text = tokenizer.render(messages, tools, generation_prompt=True, **template)
        prompts.append(Prompt(messages, tools, template, ids, text))
    if not prompts:
        raise UserError(f"{data}: holds no conversation")
    return prompts


def generated(
    model: str, adapter: str | None, prompts: list[Prompt], max_new_tokens: int, stop: frozenset[int]
) -> list[list[int]]:
    """The tokens that megasft generates after each prompt, greedily, in fp32, on this one rank."""
    sizes = resolve_topology(TopologySettings(), 1)
    lora = AdapterFile(adapter).settings() if adapter else None
    loaded = load_model(model, join_world(sizes, seed=0), torch.float32, lora, adapter)
    return [list(generate(loaded, prompt.ids, max_new_tokens, stop=stop)) for prompt in prompts]


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table("server", "model", "asked by", "answers", "tokens", "equal", "first difference")
    for row in rows:
        equal = f"{row.equal} of {row.answers}"
        table.add_row(row.server, row.model, row.asked_by, str(row.answers), str(row.tokens), equal, row.first)
    Console().print(table)
    print(NOT_RUN)


if __name__ == "__main__":
    typer.run(main)
