"""Answer questions greedily and score the answers."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from megasft.config.measures import SCORES
from megasft.data.tokenizer import ChatTokenizer
from megasft.evaluation.questions import Questions
from megasft.evaluation.score import Scores, score
from megasft.evaluation.tool_calls import read_reply
from megasft.generation.answer_file import answered
from megasft.generation.batch import generate_many
from megasft.model.qwen3_moe import Qwen3Moe


@dataclass(frozen=True)
class Scored:
    """An answer: its text, its new tokens, its scores."""

    text: str
    tokens: int
    scores: Scores


def answer_all(
    model: Qwen3Moe,
    questions: Questions,
    tokenizer: ChatTokenizer | None,
    stop: Collection[int],
    max_new_tokens: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[Scored]:
    """Answer each question and score it. Every rank calls it and gets all answers; rank 0 needs the tokenizer."""
    prompts = [question.prompt for question in questions.asked]
    tokens = generate_many(model, prompts, max_new_tokens, stop, on_step)

    def read() -> list[Scored]:
        assert tokenizer is not None
        found = []
        for question, new in zip(questions.asked, tokens, strict=True):
            answer = answered(tokenizer, new, stop)
            reply = read_reply(answer.text, questions.format, question.tools)
            scores = score(question.reference, reply, answer.finish == "length")
            if questions.format is None:  # nobody can tell a call
                scores = {name: scores[name] for name in ("exact_match", "cut_off")}
            found.append(Scored(answer.text, len(new), scores))
        return found

    return model.topology.from_first(read)


def sums_by_conversation(questions: Questions, answers: list[Scored], conversations: int) -> dict[str, np.ndarray]:
    """Of each metric that applies to any answer, the sums of its shares: fp64 [conversations, 2]."""
    sums = {name: np.zeros((conversations, 2)) for name in SCORES}
    for question, answer in zip(questions.asked, answers, strict=True):
        for name, share in answer.scores.items():
            sums[name][question.conversation] += share
    return {name: found for name, found in sums.items() if found[:, 1].any()}
