"""One rank of `megasft generate`: loads its shard of the model and answers prompts together with the others."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from transformers import Qwen3MoeConfig

from megasft.adapters.adapter_file import AdapterFile
from megasft.data.tokenizer import ChatTokenizer, load_tokenizer
from megasft.distributed.topology import join_world
from megasft.generation.answer_file import AnswerFile, say_cut_off
from megasft.generation.batch import generate_many
from megasft.generation.decode import check_length, generate
from megasft.generation.prompts import Answer, Prompts, encode, is_chat, prompts, write
from megasft.generation.request import Request
from megasft.generation.sampling import Sampler
from megasft.generation.text import TextStream, stop_tokens
from megasft.job import load_model
from megasft.messages import UserError, say_once
from megasft.model.hf_config import DTYPES, read_config
from megasft.model.hub import find_model
from megasft.model.kv_cache import KVCache

A_WEEK = 7 * 24 * 60.0  # minutes: the other ranks wait in a collective while the user types
# Control characters, which a terminal would obey, except line breaks and tabs; shown as Unicode's control pictures.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def run(request: Request) -> None:
    """Answer all prompts of a request; every rank calls it. Rank 0 reads prompts and prints answers."""
    topology = join_world(request.sizes(int(os.environ.get("WORLD_SIZE", 1))), seed=0, timeout_minutes=A_WEEK)
    with topology.together():
        if topology.is_first:
            request.check(topology.sizes)
            if is_chat(request) and "TORCHELASTIC_RUN_ID" in os.environ:
                raise UserError("ranks of torchrun cannot read the terminal: give --prompt, or run it without torchrun")
        folder = find_model(request.model)
        config = read_config(folder)
        lora = None if request.adapter is None else AdapterFile(request.adapter).settings()
        dtype = request.precision(config)
        # Greedy answers to a file need not wait for each other; a sampler draws in the order of the prompts.
        many = request.jsonl is not None and not request.sampling.get("temperature")
        kind = AnswerFile if many else _Conversation
        asking = kind(request, load_tokenizer(folder), config) if topology.is_first else None
    ask = asking.ask if asking else None
    chat = topology.from_first(lambda: is_chat(request))
    # Read a prompt that is given before the weights: a mistake in it is refused within seconds.
    asked = None if chat else topology.from_first(ask)
    model = load_model(request.model, topology, DTYPES[dtype], lora, request.adapter, quant=request.quant)
    stop = topology.from_first(lambda: asking and stop_tokens(folder, config, asking.tokenizer))
    sampler, cache = Sampler(**request.sampling), KVCache()
    while (asked := asked or topology.from_first(ask)) is not None:
        if many:
            answers = generate_many(model, asked, request.max_new_tokens, stop)
            if isinstance(asking, AnswerFile):
                asking.hear(answers, stop)
        else:
            with _ctrl_c_stops(chat and topology.is_first) as interrupted:
                tokens = generate(model, asked, request.max_new_tokens, sampler, stop, cache, interrupted)
                for token in tokens:
                    if isinstance(asking, _Conversation):
                        asking.hear(token, token in stop)
                if isinstance(asking, _Conversation):
                    asking.end(interrupted())
        asked = None
    if topology.is_first:
        say_once("For looking at results, not for serving. vLLM serves this:")
        say_once(request.vllm_command())


class _Conversation:
    """Rank 0's part: prompts in, tokens out."""

    def __init__(self, request: Request, tokenizer: ChatTokenizer, config: Qwen3MoeConfig) -> None:
        self._context = config.max_position_embeddings
        self._request, self.tokenizer, self._stream = request, tokenizer, TextStream(tokenizer)
        self._prompts: Prompts = prompts(request)
        self._answer: Answer | None = None  # to the prompt before
        self._text, self._tokens, self._finish, self._started = "", 0, "length", 0.0
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")

    def ask(self) -> list[int] | None:
        """The tokens of the next prompt; None after the last."""
        try:
            messages, tools, own = next(self._prompts) if self._answer is None else self._prompts.send(self._answer)
        except StopIteration:
            return None
        self._text, self._tokens, self._finish, self._started = "", 0, "length", time.monotonic()
        variables = self._request.run_template | own | self._request.template
        prompt = encode(self.tokenizer, messages, tools, variables)
        check_length(prompt, self._context)
        return prompt

    def hear(self, token: int, ends: bool) -> None:
        """Print the text of a token."""
        self._tokens += 1
        if ends:
            self._finish = "stop"
        else:
            self._give(self._stream.push(token))

    def end(self, interrupted: bool) -> None:
        """Finish the answer, complete or interrupted."""
        self._give(self._stream.finish())
        if self._request.jsonl is None:
            write("\n")
        finish = "interrupted" if interrupted and self._finish != "stop" else self._finish
        self._answer = Answer(self._text, self._tokens, finish)
        if finish == "length":
            say_cut_off(self._tokens)

    def _give(self, text: str) -> None:
        self._text += text
        if self._request.jsonl is None:
            write(text.translate(CONTROLS) if sys.stdout.isatty() else text)


@contextlib.contextmanager
def _ctrl_c_stops(answer: bool) -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C was pressed, which the launcher sends as SIGUSR2. Unless `answer`, it ends
    the rank.
    """
    pressed: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: pressed.append(number)) if answer else None
    try:
        yield lambda: bool(pressed)
    finally:
        if answer:
            signal.signal(signal.SIGUSR2, before)
