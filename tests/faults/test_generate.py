"""`megasft generate` from the command line: its output, its errors and its exit."""

import fcntl
import json
import multiprocessing
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft import cli
from megasft.adapters.export import export_adapter
from megasft.config.values import ALL_LINEAR
from megasft.data.conversations import Conversation, read_conversations
from megasft.data.tokenizer import load_tokenizer
from megasft.generation import run
from megasft.launch.launcher import ASK_AGAIN_SECONDS
from tests.parity.peft_adapters import loaded_by_peft
from tests.parity.reference import random_adapter, tiny_config, write_adapter
from tests.support.forked import Torchrun, exit_as
from tests.support.speech import assert_one_line, spoken

TOOLS = '[{"type": "function", "function": {"name": "f"}}]'
GREETING = "what comes after 3? naïve"


@pytest.fixture
def adapter(world) -> Path:
    """A run directory with an adapter of the default layers."""
    config = tiny_config(vocab_size=264, mlp_only_layers=[])
    write_adapter(random_adapter(config, 4, frozenset(ALL_LINEAR)), world / "plain", 4, 8)
    export_adapter(world / "plain", world / "run" / "adapter", "per-expert", str(world / "model"))
    return world / "run" / "adapter"


def answer_by_peft(world: Path, adapter: Path, messages: list[dict], new: int) -> tuple[str, str]:
    """The answer, and "stop" where it came to its end or "length" where it was cut off."""
    tokenizer, model = load_tokenizer(world / "model"), loaded_by_peft(world / "model", adapter)
    ids = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=0,
    )[0, ids.shape[1] :]
    ended = out[-1] == tokenizer.eos_id
    return tokenizer.decode(out[:-1] if ended else out), "stop" if ended else "length"


# --- what it prints ---


def test_only_the_answer_is_on_standard_output(megasft, world, adapter):
    messages = [{"role": "system", "content": "Say it."}, {"role": "user", "content": GREETING}]
    want, finish = answer_by_peft(world, adapter, messages, 30)
    assert finish == "length", "what is said of an answer that is cut off is to be seen"
    # The run file says model, adapter, topology (two ranks) and precision; the prompt is given, or piped in.
    options = ["--system", "Say it.", "--max-new-tokens", "30"]
    for more, typed in ((["--prompt", GREETING], ""), ([], GREETING)):
        ended = megasft("generate", f"{world}/job.toml", *options, *more, ranks=2, typed=typed)
        assert ended.codes == [0, 0], ended.said
        assert ended.printed == want + "\n"
        cut, notice, command = ended.said.splitlines()
        assert re.fullmatch(r"\[cut off after 30 tokens, the limit of .*\]", cut)
        assert "not for serving" in notice
        assert command == f"vllm serve {world}/model --enable-lora --lora-modules run={adapter} --max-lora-rank 8"


def test_torchrun_launches_it_too(world, adapter):
    words = ["--nproc-per-node", "2", "-m", "megasft", "generate", f"{world}/job.toml"]
    words += ["--prompt", GREETING, "--max-new-tokens", "4"]
    command = Torchrun(words, world / "errors", world / "printed")
    assert command.wait() == 0, command.said()
    want, _ = answer_by_peft(world, adapter, [{"role": "user", "content": GREETING}], 4)
    assert (world / "printed").read_text() == want + "\n"


def test_a_file_of_conversations_becomes_one_of_answers(megasft, world, adapter):
    ended = megasft(
        "generate", f"{world}/model", "--adapter", str(adapter), "--jsonl", f"{world}/validation.jsonl",
        "--max-new-tokens", "8", "--expert-parallel", "2", ranks=2,
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.said
    (world / "answers.jsonl").write_text(ended.printed)
    asked, answered = (list(read_conversations(world / name)) for name in ("validation.jsonl", "answers.jsonl"))
    assert len(asked) == len(answered) == 4
    records = [json.loads(line) for line in ended.printed.splitlines()]
    for before, after, record in zip(asked, answered, records, strict=True):
        assert isinstance(after, Conversation)
        assert after.messages[:-1] == before.messages[:-1]
        want = answer_by_peft(world, adapter, before.messages[:-1], 8)
        assert (after.messages[-1]["content"], record["finish"]) == want
        assert record["new_tokens"] == 8 if record["finish"] == "length" else record["new_tokens"] <= 8


# --- what it refuses ---


def other_adapter(**sizes):
    def spoil(world: Path) -> None:
        config = tiny_config(vocab_size=264, mlp_only_layers=[], **sizes)
        write_adapter(random_adapter(config, 4, frozenset(ALL_LINEAR)), world / "other", 4, 8)

    return spoil


def with_text(name: str, text: str):
    return lambda world: (world / name).write_text(text)


def short_context(world: Path) -> None:
    path = world / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 32}))


def without_weights(world: Path) -> None:
    """Remove the weights, to show that the error comes before they are read."""
    path = world / "model" / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "norm" in name}, path, {"format": "pt"})


def nothing(world: Path) -> None: ...


# what is wrong, arguments ({} is the folder of the job), words that the line must hold
BEFORE_THE_LAUNCH = {
    "nothing trained yet": (nothing, "{}/job.toml", ["job.toml", "no adapter in", "train it first"]),
    "a folder of nothing": (nothing, "{}", ["neither a run directory", "PEFT adapter", "model"]),
    "no such model": (nothing, "{}/modle", ["modle", "no such folder", "hub id"]),
    "no such adapter": (nothing, "{}/model --adapter {}/nope", ["nope", "no such folder"]),
    "no adapter in the folder": (nothing, "{}/model --adapter {}", ["adapter_config.json"]),
    "two adapters": (other_adapter(), "{}/other --adapter {}/other", ["is an adapter"]),
    "an adapter that names no base": (other_adapter(), "{}/other", ["names no base model"]),
    "heads that tensor parallel does not divide": (
        nothing, "{}/model --tensor-parallel 3", ["tensor_parallel = 3", "num_attention_heads = 8"]
    ),
    "experts that expert parallel does not divide": (
        nothing, "{}/model --expert-parallel 3", ["expert_parallel = 3", "num_experts = 8", "1, 2"]
    ),
    "more stages than layers": (nothing, "{}/model --pipeline-parallel 4", ["num_hidden_layers = 3", "every stage needs a layer"]),
    "adapter of another model": (
        other_adapter(hidden_size=32), "{}/model --adapter {}/other -p x", ["adapter_model.safetensors", "another model"]
    ),
    "adapter of a larger model": (
        other_adapter(num_hidden_layers=4), "{}/model --adapter {}/other -p x", ["model.layers.3", "adapter of another model"]
    ),
    "negative temperature": (nothing, "{}/model --temperature -1", ["temperature = -1", "0"]),
    "top-k without temperature": (nothing, "{}/model --top-k 5", ["top_k", "temperature"]),
    "no new token": (nothing, "{}/model --max-new-tokens 0", ["max-new-tokens"]),
    "unknown option": (nothing, "{}/model --temprature 1", ["--temprature"]),
    "tools that are none": (with_text("tools.json", "{}"), "{}/model --tools {}/tools.json", ["tools.json", "a list"]),
    "a template variable without value": (nothing, "{}/model --template-arg thinking", ["--template-arg thinking", "="]),
    "prompt and file": (nothing, "{}/model --prompt x --jsonl {}/train.jsonl", ["--prompt", "--jsonl"]),
    "no such file of conversations": (nothing, "{}/model --jsonl {}/nope.jsonl", ["nope.jsonl", "no such file"]),
}  # fmt: skip

ON_THE_RANKS = {
    "prompt beyond the context": (
        lambda world: short_context(world) or without_weights(world), "{}/model -p much_more_than_there_is_room_for",
        ["the prompt has", "context of 32"],
    ),
    "no prompt": (without_weights, "{}/model", ["no prompt", "--prompt TEXT"]),
    "a template that fails": (
        with_text("model/chat_template.jinja", "{{ raise_exception('not today') if n }}{{ messages[0].content }}"),
        "{}/model -p x --template-arg n=1", ["chat template", "not today"],
    ),
    "a conversation that is none": (with_text("a.jsonl", '{"messages": 3}\n'), "{}/model --jsonl {}/a.jsonl", ["a.jsonl:1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_THE_LAUNCH)
def test_a_mistake_is_refused_before_the_launch(megasft, world, case):
    spoil, text, words = BEFORE_THE_LAUNCH[case]
    spoil(world)
    ended = megasft("generate", *text.format(*[world] * text.count("{}")).split())
    assert_one_line(ended.said, words)
    assert ended.codes == [2]


@pytest.mark.parametrize("case", ON_THE_RANKS)
def test_a_mistake_that_only_ranks_find_is_reported_once(megasft, world, case):
    spoil, text, words = ON_THE_RANKS[case]
    spoil(world)
    ended = megasft("generate", *text.format(*[world] * text.count("{}")).split(), ranks=2)
    assert_one_line(ended.said, words)
    assert ended.codes == [2, 2]
    assert ended.printed == ""


# --- how a chat goes and ends ---


class Terminal:
    """A `megasft` command with a terminal of its own, forked; its answers end only with Ctrl-C."""

    def __init__(self, arguments: list[str]) -> None:
        ours, theirs = pty.openpty()
        self.seen, self._terminal, self._closed = "", ours, False
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        opened, opens = context.Pipe(duplex=False)
        self.process = context.Process(target=_chat, args=(arguments, os.ttyname(theirs), opens), daemon=True)
        self.process.start()
        opened.recv()
        os.close(theirs)

    def ended(self) -> int | None:
        """The exit code."""
        self.process.join(30)
        return self.process.exitcode

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` appears, and discard it and everything before."""
        self.wait_until(lambda: text in self.seen)
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.seen
            self._read()

    def rest(self) -> str:
        """The output until the command has ended."""
        self.wait_until(lambda: self._closed, 60)
        return self.seen

    def kill(self) -> None:
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self._terminal)

    def _read(self) -> None:
        if select.select([self._terminal], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self._terminal, 65536).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # nobody has the other end any more
                self._closed = True


def _chat(arguments: list[str], terminal: str, opens: Connection) -> None:
    os.setsid()
    device = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(device, termios.TIOCSCTTY, 0)
    opens.send("")
    for stream in range(3):
        os.dup2(device, stream)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ["TERM"] = "dumb"  # no escape sequences of readline's
    run.stop_tokens = lambda *_: frozenset()
    sys.argv = sys.orig_argv = ["megasft", *arguments]
    exit_as(cli.main)


@pytest.fixture
def endless(world, adapter) -> list[str]:
    """Arguments of a command whose answers would take hours."""
    return ["generate", f"{world}/job.toml", "--max-new-tokens", "100000"]


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(endless, adapter):
    terminal = Terminal(endless)
    try:
        for _ in range(2):
            terminal.wait_for("> ")
            terminal.type("what comes after 3?\n")
            terminal.wait_for("what comes after 3?\n")
            terminal.wait_until(lambda: len(terminal.seen) > 50)
            terminal.type("\x03")
            time.sleep(ASK_AGAIN_SECONDS + 0.5)  # a second one sooner would end the chat
        terminal.wait_for("> ")
        terminal.type("\x04")
        said = terminal.rest()
        assert "not for serving" in said
        assert f"--lora-modules run={adapter} --max-lora-rank 8" in said
        assert "Traceback" not in said
        assert terminal.ended() == 0
    finally:
        terminal.kill()


def test_ctrl_c_at_the_prompt_ends_the_chat(endless):
    terminal = Terminal([*endless, "--tensor-parallel", "1"])
    try:
        terminal.wait_for("> ")
        terminal.type("\x03")
        said = terminal.rest()
        assert spoken(said) == ["megasft: interrupted"], said
        assert "Traceback" not in said
        assert terminal.ended() == 130
    finally:
        terminal.kill()


def test_a_signal_to_the_launcher_ends_an_answer_at_once(world, endless, environment):
    """Of a command started as a user starts it."""
    script = world / "endless.py"
    script.write_text(
        "import logging, warnings\n"
        "warnings.filterwarnings('ignore')\n"
        "logging.disable(logging.WARNING)\n"
        "from megasft import cli\n"
        "from megasft.generation import run\n"
        "run.stop_tokens = lambda *_: frozenset()\n"
        "cli.main()\n"
    )
    command = [sys.executable, str(script), *endless, "--tensor-parallel", "1", "-p", "hi"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - asked < 10
        assert said.decode() == "megasft: interrupted\n"
        assert process.returncode == 130
    finally:
        process.kill()
