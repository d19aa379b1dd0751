"""Answer the conversations of a file greedily, many at once: rank 0's part."""

from collections.abc import Collection
from itertools import islice

from transformers import Qwen3MoeConfig

from megasft.data.tokenizer import ChatTokenizer
from megasft.generation.batch import ROWS
from megasft.generation.decode import check_length
from megasft.generation.prompts import Answer, FilePrompt, encode, file_prompts
from megasft.generation.request import Request
from megasft.messages import say_once


class AnswerFile:
    """Prompts in, lines out.

    Args:
        at_once: conversations that are read, and answered, together.
    """

    def __init__(self, request: Request, tokenizer: ChatTokenizer, config: Qwen3MoeConfig, at_once: int = ROWS) -> None:
        assert request.jsonl is not None
        self._request, self.tokenizer, self._at_once = request, tokenizer, at_once
        self._context = config.max_position_embeddings
        self._prompts = file_prompts(request, request.jsonl)
        self._asked: list[FilePrompt] = []

    def ask(self) -> list[list[int]] | None:
        """The tokens of the next prompts; None after the last. Raises UserError for one that cannot be used."""
        self._asked = list(islice(self._prompts, self._at_once))
        found = []
        for prompt in self._asked:
            variables = self._request.run_template | prompt.template | self._request.template
            found.append(encode(self.tokenizer, prompt.messages, prompt.tools, variables))
            check_length(found[-1], self._context)
        return found or None

    def hear(self, answers: list[list[int]], stop: Collection[int]) -> None:
        """Print the answers to them."""
        for prompt, tokens in zip(self._asked, answers, strict=True):
            answer = answered(self.tokenizer, tokens, stop)
            prompt.write(answer)
            if answer.finish == "length":
                say_cut_off(answer.tokens)


def answered(tokenizer: ChatTokenizer, tokens: list[int], stop: Collection[int]) -> Answer:
    """The answer that these new tokens are; a last one of `stop` is no part of its text."""
    ends = bool(tokens) and tokens[-1] in stop
    return Answer(tokenizer.decode(tokens[:-1] if ends else tokens), len(tokens), "stop" if ends else "length")


def say_cut_off(tokens: int) -> None:
    """Say that an answer has not come to its end."""
    say_once(f"[cut off after {tokens} tokens, the limit of --max-new-tokens or of the model's context]")
