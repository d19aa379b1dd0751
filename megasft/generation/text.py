"""Tokens to text as they come: the bytes of a character may be split over several tokens. Which tokens end it."""

import json
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig

from megasft.data.tokenizer import ChatTokenizer
from megasft.messages import UserError

UNFINISHED = "\ufffd"  # a tokenizer decodes bytes that are no character, or not yet, to this
MOST_UNFINISHED = 3  # bytes of a UTF-8 character that lacks one


class TextStream:
    """`push` each token, print what it returns, and `finish`: all of it together is the decoded text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last tokens given out; spacing may depend on them
        self._tokens: list[int] = []  # the tokens after them, which end in an incomplete character
        self._given = 0  # characters of `_tokens` given out already

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        text = self._text()
        certain = text.rstrip(UNFINISHED)
        certain = text[: max(len(certain), len(text) - MOST_UNFINISHED)]
        new, self._given = certain[self._given :], max(self._given, len(certain))
        if certain == text:
            self._context, self._tokens, self._given = self._tokens, [], 0
        return new

    def finish(self) -> str:
        """The rest of the text, with replacement characters for incomplete ones."""
        rest = self._text()[self._given :]
        self._context, self._tokens, self._given = [], [], 0
        return rest

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._tokens)
        if text.startswith(before):
            return text[len(before) :]
        # SentencePiece decodes a run of byte tokens together: a wrong or missing one invalidates the run.
        if len(self._tokens) <= MOST_UNFINISHED:
            return UNFINISHED * len(self._tokens)
        self._context = []
        return self._tokenizer.decode(self._tokens)


def stop_tokens(folder: Path, config: Qwen3MoeConfig, tokenizer: ChatTokenizer) -> frozenset[int]:
    """Tokens that end an answer: those of generation_config.json, config.json, the tokenizer and the chat template."""
    path = folder / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        named = generation.get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable generation configuration ({error})") from None
    found: set[Any] = {tokenizer.eos_id, tokenizer.hf.eos_token_id}
    for value in (named, getattr(config, "eos_token_id", None)):
        found |= set(value) if isinstance(value, list) else {value}
    return frozenset(token for token in found if isinstance(token, int))
