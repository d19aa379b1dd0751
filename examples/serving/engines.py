"""vLLM and llama.cpp: how each is started, what it serves, and how it is asked for greedy tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server import Server

from megasft.generation.request import VLLM_RANKS

HERE = Path(__file__).parent
Engine = Literal["vLLM", "llama.cpp"]


@dataclass(frozen=True)
class Prompt:
    """A conversation up to an answer: as messages, and as the tokens that megasft makes of it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template: dict[str, Any]
    ids: list[int]
    text: str

    @property
    def is_text(self) -> bool:
        """Whether it has neither tools nor calls of them, which servers render in ways of their own."""
        return not self.tools and all(set(message) == {"role", "content"} for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """The tokens of an answer, why it ended, and the number of tokens that the server made of the prompt."""

    tokens: list[int]
    finish: str
    prompt_tokens: int
    asked_by: Literal["messages", "token ids"]


@dataclass(frozen=True)
class Served:
    """A server to start: its command, and what to put into a request for each model that it serves."""

    engine: Engine
    name: str
    command: list[str]
    models: dict[str, dict[str, Any]]

    def ask(self, server: Server, model: str, prompt: Prompt, max_new_tokens: int) -> Reply:
        """Greedy tokens after a prompt. Raises ServerFailed."""
        by_messages = prompt.is_text and self._has_tokenizer(server, prompt)
        body = self.models[model] | {"temperature": 0, "max_tokens": max_new_tokens}
        if by_messages:
            body |= {"messages": prompt.messages, "chat_template_kwargs": prompt.template, "logprobs": True}
        else:
            body |= {"prompt": prompt.ids, "logprobs": 1}
        said = server.post("/v1/chat/completions" if by_messages else "/v1/completions", body)
        choice = said["choices"][0]
        tokens = (
            choice["token_ids"] if self.engine == "vLLM" else [step["id"] for step in choice["logprobs"]["content"]]
        )
        kind: Literal["messages", "token ids"] = "messages" if by_messages else "token ids"
        return Reply(tokens, choice["finish_reason"], said["usage"]["prompt_tokens"], kind)

    def _has_tokenizer(self, server: Server, prompt: Prompt) -> bool:
        """vLLM always has the model's own; llama.cpp one that its converter knows."""
        if self.engine == "vLLM":
            return True
        return bool(server.post("/tokenize", {"content": prompt.text, "parse_special": True})["tokens"] == prompt.ids)


def vllm(python: Path, model: str, adapter: str, merged: str, rank: int, context: int) -> list[Served]:
    """Base and adapter by one server, the merged model by another; no `adapter` leaves the first to the base."""
    common = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"]
    common += ["--max-model-len", str(context), "--host", "127.0.0.1"]
    start, tokens = [str(python), str(HERE / "vllm_server.py")], {"return_token_ids": True}
    models = {"base": {"model": "base", **tokens}}
    lora = []
    if adapter:
        models["base + adapter"] = {"model": "adapter", **tokens}
        width = next(size for size in VLLM_RANKS if size >= rank)
        lora = ["--enable-lora", "--lora-modules", f"adapter={adapter}", "--max-lora-rank", str(width)]
    together = [*start, "--model", model, "--served-model-name", "base", *lora, *common]
    alone = [*start, "--model", merged, "--served-model-name", "merged", *common]
    return [
        Served("vLLM", "vLLM with the adapter" if adapter else "vLLM", together, models),
        Served("vLLM", "vLLM with the merged model", alone, {"merged": {"model": "merged", **tokens}}),
    ]


def llama_cpp(python: Path, model: str, adapter: str, merged: str, folder: Path, context: int) -> list[Served]:
    """Base and adapter by one server, the merged model by another."""
    start, size = [str(python), str(HERE / "llama_cpp_server.py")], ["--context", str(context)]
    # Without its cache of prompts, in which it finds keys and values that another scale made.
    plain: dict[str, Any] = {"cache_prompt": False}
    without = plain | {"lora": [{"id": 0, "scale": 0.0}]}
    together = [*start, model, "--adapter", adapter, "--folder", str(folder / "gguf"), *size]
    alone = [*start, merged, "--folder", str(folder / "gguf-merged"), *size]
    return [
        Served("llama.cpp", "llama.cpp with the adapter", together, {"base": without, "base + adapter": plain}),
        Served("llama.cpp", "llama.cpp with the merged model", alone, {"merged": plain}),
    ]
