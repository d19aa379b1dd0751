"""Answers to a few validation prompts at the end of a run, by the base model and with the trained adapter."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from megasft.data.dataset import Mix
from megasft.data.tokenizer import load_tokenizer
from megasft.distributed.topology import Topology
from megasft.generation.answer_file import answered
from megasft.generation.batch import generate_many
from megasft.generation.text import stop_tokens
from megasft.lora.sharded import without_adapters
from megasft.messages import say
from megasft.model.hf_config import read_config
from megasft.model.hub import find_model
from megasft.train.trainer import Trainer

MOST_TOKENS = 128  # of an answer
FILE = "answers.json"


def write_answers(trainer: Trainer, topology: Topology) -> None:
    """Write `answers.json` of a run that is done, if it is asked for; every rank calls it."""
    config = trainer.config
    if not config.logging.answers or trainer.validation is None:
        return
    prompts = choose(
        Mix.of(trainer.validation), config.logging.answers, trainer.model.hf_config.max_position_embeddings
    )
    folder = find_model(config.job.model)
    tokenizer = load_tokenizer(folder) if topology.is_first else None
    stop = topology.from_first(lambda: tokenizer and stop_tokens(folder, read_config(folder), tokenizer))

    asked = [prompt for prompt, _ in prompts]

    def answers() -> list[list[int]]:
        return generate_many(trainer.model, asked, MOST_TOKENS, stop, trainer.progress.count_micro_batch)

    trainer.progress.begin("the answers")
    with without_adapters(trainer.model):
        before = answers()
    after = answers()
    if tokenizer is not None:
        texts = [
            {
                "prompt": tokenizer.decode(prompt),
                "reference": tokenizer.decode([token for token in reference if token not in stop]).rstrip("\n"),
                "before": answered(tokenizer, base, stop).text,
                "after": answered(tokenizer, trained, stop).text,
            }
            for (prompt, reference), base, trained in zip(prompts, before, after, strict=True)
        ]
        path = Path(config.job.output_dir) / FILE
        try:
            path.write_text(json.dumps({"answers": texts}, indent=1) + "\n")
        except OSError as error:
            say(f"{path}: cannot be written ({error.strerror}); the adapter is complete")


def choose(samples: Mix, count: int, context: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, reference) in tokens of at most `count` samples, evenly spaced: the last assistant turn, and all before
    it. Samples without a prompt, and those that leave no room in the context, are left out.
    """
    numbers = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    found = []
    for number in numbers.tolist():
        ids, mask = samples[number]
        start, end = last_turn(mask)
        if 0 < start < min(end, context):
            found.append((ids[:start].tolist(), ids[start:end].tolist()))
    return found


def last_turn(mask: Tensor) -> tuple[int, int]:
    """[start, end) of the last run of supervised tokens, (0, 0) where there is none: mask [tokens], bool."""
    supervised = mask.nonzero().flatten()
    if not len(supervised):
        return 0, 0
    end = int(supervised[-1]) + 1
    before = (~mask[:end]).nonzero().flatten()
    return (int(before[-1]) + 1 if len(before) else 0), end
