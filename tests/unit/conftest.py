"""Run files, and tokenizers for the data tests: small ones trained here, with the chat templates of tests/unit/templates."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megasft.data.tokenizer import ChatTokenizer, load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CORPUS = [
    "The weather in Paris is mild, and the answer to the question is forty-two.",
    'Call the function with {"name": "get_weather", "arguments": {"city": "Paris"}} and wait for the result.',
    "user assistant system tool think, hello world, naïve café, über, 1 2 3 4 5 6 7 8 9 0",
] * 20


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a run file to an empty working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "job.toml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_file


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder with a byte-level BPE tokenizer made like Qwen's, and no chat template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "a\n\n\nb\n\n\n\n"] * 3, trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ORDINARY)
    folder = tmp_path_factory.mktemp("bpe")
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare SentencePiece BPE model with the ChatML tokens in its vocabulary."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def with_template(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatTokenizer]:
    """Make the BPE tokenizer with a template: the name of a file in templates/, or Jinja text."""

    @cache
    def make(template: str) -> ChatTokenizer:
        folder = tmp_path_factory.mktemp("model")
        shutil.copytree(bpe_folder, folder, dirs_exist_ok=True)
        file = TEMPLATES / f"{template}.jinja"
        text = template if "{" in template else file.read_text()
        (folder / "chat_template.jinja").write_text(text)
        return load_tokenizer(folder)

    return make
