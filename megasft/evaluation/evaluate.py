"""Measure a model, and its adapter beside its base, on held-out conversations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megasft.config.schema import RunConfig
from megasft.data.tokenizer import ChatTokenizer, load_tokenizer
from megasft.distributed.topology import Topology
from megasft.evaluation.answers import Scored, answer_all, sums_by_conversation
from megasft.evaluation.held_out import HeldOut, read_held_out
from megasft.evaluation.losses import LOSS, RIGHT, TOKENS, measure_losses
from megasft.evaluation.questions import Questions, ask
from megasft.evaluation.statistics import Difference, difference, ratio
from megasft.generation.text import stop_tokens
from megasft.lora.sharded import without_adapters
from megasft.messages import UserError
from megasft.model.hf_config import read_config
from megasft.model.hub import find_model
from megasft.model.qwen3_moe import Qwen3Moe

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Task:
    """What is to be measured; the same on every rank, but for the tokenizer, which rank 0 has.

    Attributes:
        data: as the user named it.
        questions: None where no answer is asked for.
    """

    data: str
    held_out: HeldOut
    questions: Questions | None
    stop: frozenset[int]
    max_new_tokens: int
    tokenizer: ChatTokenizer | None = None


@dataclass(frozen=True)
class Side:
    """What was measured of the base, or of the adapter.

    Attributes:
        losses: sums, fp64 [conversations, parts, 3] (`losses.measure_losses`).
        answers: to the questions, in their order.
    """

    losses: np.ndarray
    answers: list[Scored]


@dataclass(frozen=True)
class Metric:
    """A mean over conversations. `sums`, by side, are [conversations, 2]: what is added up, and its divisor."""

    name: str
    sums: dict[str, np.ndarray]

    @property
    def count(self) -> int:
        """Tokens, turns, calls or arguments that it is a mean over."""
        return int(next(iter(self.sums.values()))[:, 1].sum())

    def value(self, side: str) -> float:
        """Of one side."""
        mean = ratio(self.sums[side])
        return float(np.exp(mean)) if self._exponential else mean

    @cached_property
    def difference(self) -> Difference | None:
        """Adapter minus base, where both were measured."""
        if BASE not in self.sums or ADAPTER not in self.sums:
            return None
        return difference(self.sums[BASE], self.sums[ADAPTER], self._exponential)

    @property
    def _exponential(self) -> bool:
        return self.name.endswith("perplexity")


@dataclass(frozen=True)
class Evaluation:
    """Results. `sides` has "base", "adapter", or both."""

    task: Task
    sides: dict[str, Side]

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """By name: of all tokens, of those of text and of tool calls, of each turn; then those of the answers."""
        losses = {name: side.losses for name, side in self.sides.items()}
        some = next(iter(losses.values()))
        found = _of_tokens("", losses, ("loss", "perplexity", "token_accuracy"))
        for name, parts in {"text": slice(0, None, 2), "tool_call": slice(1, None, 2)}.items():
            found += _of_tokens(f"{name}/", {side: sums[:, parts] for side, sums in losses.items()})
        for turn in range(-(-some.shape[1] // 2)):
            parts = slice(2 * turn, 2 * turn + 2)
            found += _of_tokens(f"turn_{turn + 1}/", {side: sums[:, parts] for side, sums in losses.items()})
        if self.task.questions is not None:
            answers = {
                side: sums_by_conversation(self.task.questions, one.answers, len(some))
                for side, one in self.sides.items()
            }
            for name in next(iter(answers.values())):
                found.append(Metric(name, {side: sums[name] for side, sums in answers.items()}))
        return {metric.name: metric for metric in found}


def evaluate(
    config: RunConfig,
    model: Qwen3Moe,
    data: str | Path | None = None,
    generate: int | Literal["all"] = 0,
    max_new_tokens: int = 512,
) -> Evaluation:
    """Measure `model` on held-out conversations; every rank calls it, and gets the same results.

    Losses are those of `Trainer.evaluate` on the same conversations: nats per supervised token, over all of them, with
    what is too long treated as `config` says. With adapters in the model, the base is measured too, without them.

    Args:
        config: names the model's folder, whose tokenizer is used, the treatment of data, and `per_device_batch`.
        data: a file or folder of conversations; by default `[data] validation_path`.
        generate: of how many conversations, evenly spaced, to answer every supervised assistant turn, greedily and from
            the true history.
        max_new_tokens: of an answer.

    Returns:
        An `Evaluation`; `metrics["loss"].value("adapter")`, `metrics["loss"].difference.low`.

    Raises:
        UserError: no data, data that training would refuse, or no turn to answer.
    """
    return measure(config, model, prepare(config, model.topology, data, generate, max_new_tokens))


def prepare(
    config: RunConfig,
    topology: Topology,
    data: str | Path | None,
    generate: int | Literal["all"] = 0,
    max_new_tokens: int = 512,
) -> Task:
    """Read the conversations on rank 0, for all; needs no weights. Raises UserError."""
    tokenizers: list[ChatTokenizer] = []

    def read() -> Task:
        path = data or config.data.validation_path
        if path is None:
            raise UserError("nothing to evaluate on; name a file of conversations, or a run with a validation_path")
        folder = find_model(config.job.model)
        hf_config = read_config(folder)
        tokenizer = load_tokenizer(folder, config.data.template_args, config.data.template_date)
        tokenizer.check_vocabulary(hf_config.vocab_size)
        tokenizers.append(tokenizer)
        held_out = read_held_out(path, tokenizer, config)
        questions = None
        if generate:
            count = None if generate == "all" else generate
            context = hf_config.max_position_embeddings
            questions = ask(held_out.files, held_out.conversations, count, tokenizer, config, context)
        return Task(str(path), held_out, questions, stop_tokens(folder, hf_config, tokenizer), max_new_tokens)

    task: Task = topology.from_first(read)
    return Task(*list(vars(task).values())[:-1], *tokenizers) if tokenizers else task


def measure(
    config: RunConfig, model: Qwen3Moe, task: Task, say_what: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Losses and answers of the base, and of the adapter if the model has one. Every rank calls it.

    Args:
        say_what: is told what comes next.
    """
    hyper = config.hyperparameters

    def side(name: str) -> Side:
        say_what(f"{name}: losses")
        losses = measure_losses(model, task.held_out, hyper.sequence_length, hyper.per_device_batch)
        if task.questions is None:
            return Side(losses, [])
        say_what(f"{name}: answers to {len(task.questions.asked):,} turns")
        return Side(losses, answer_all(model, task.questions, task.tokenizer, task.stop, task.max_new_tokens))

    with without_adapters(model):
        sides = {BASE: side(BASE)}
    if model.lora.targets:
        sides[ADAPTER] = side(ADAPTER)
    return Evaluation(task, sides)


def _of_tokens(
    prefix: str, losses: dict[str, np.ndarray], names: tuple[str, ...] = ("loss", "token_accuracy")
) -> list[Metric]:
    """Metrics of some parts of the conversations; none where these have no token."""
    sums = {side: parts.sum(1) for side, parts in losses.items()}
    if not next(iter(sums.values()))[:, TOKENS].any():
        return []
    of = {"loss": LOSS, "perplexity": LOSS, "token_accuracy": RIGHT}
    return [Metric(prefix + name, {side: one[:, [of[name], TOKENS]] for side, one in sums.items()}) for name in names]
