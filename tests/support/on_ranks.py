"""What the tests run on the ranks of the pool."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasft import host, job
from megasft.config.parallelism import resolve_topology
from megasft.config.schema import RunConfig, load_config
from megasft.data.dataset import Samples
from megasft.distributed.topology import Topology, regroup
from megasft.evaluation.evaluate import evaluate
from megasft.evaluation.report import as_json
from megasft.generation import batch, decode
from megasft.generation.batch import generate_many
from megasft.generation.decode import generate
from megasft.generation.sampling import Sampler
from megasft.job import build_model, load_data
from megasft.lora.sharded import without_adapters
from megasft.model.batch import IGNORED, MicroBatch, Segments
from megasft.model.kv_cache import KVCache
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.quant.weight import Slot
from megasft.train.trainer import Trainer
from megasft.train.validation_answers import ValidationAnswers

Sample = tuple[Tensor, Tensor]


def random_samples(vocabulary: int, lengths: list[int], seed: int = 2) -> list[Sample]:
    """(ids, mask) of these lengths; shares of supervised tokens from one token to nearly all."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    samples = []
    for n in lengths:
        mask = torch.rand(n, generator=generator) < chance.choice([0.1, 0.5, 0.95])
        mask[0], mask[n // 2] = False, True
        samples.append((torch.randint(0, vocabulary, (n,), generator=generator), mask))
    return samples


def as_samples(samples: list[Sample]) -> Samples:
    """For the trainer."""
    ends = torch.tensor([len(ids) for ids, _ in samples]).cumsum(0)
    return Samples(torch.cat([ids for ids, _ in samples]).int(), torch.cat([mask for _, mask in samples]), ends)


def start(settings: dict[str, Any]) -> tuple[RunConfig, Topology, Qwen3Moe]:
    """The model of a run file on the ranks of this world."""
    config = RunConfig.from_dict(settings)
    topology = regroup(resolve_topology(config.data.topology, dist.get_world_size()), config.job.seed)
    return config, topology, build_model(config, topology)


def logits(settings: dict[str, Any], samples: list[Sample]) -> Tensor:
    """Logits of all samples end to end, [tokens, vocabulary]."""
    _, topology, model = start(settings)
    model.eval()
    ids = torch.cat([ids for ids, _ in samples])
    padding = -len(ids) % topology.sizes.tensor
    lengths = [len(ids) for ids, _ in samples] + ([padding] if padding else [])
    tokens = torch.cat([ids, ids.new_zeros(padding)]).to(host.device())
    with torch.no_grad():
        out = model.logits(MicroBatch(tokens, torch.full_like(tokens, IGNORED), Segments.of(lengths, tokens.device)))
    return out[: len(ids)]


Parts = dict[str, tuple[Any, Tensor]]  # name -> (index into the whole tensor, this rank's part)


def gradients(settings: dict[str, Any], samples: list[Sample]) -> tuple[float, float, Parts]:
    """(loss, gradient norm, this rank's parts of every LoRA gradient) of one global batch made of all samples."""
    config, topology, model = start(settings)
    return measure_gradients(Trainer(config, topology, model, as_samples(samples)), len(samples))


def measure_gradients(trainer: Trainer, samples: int) -> tuple[float, float, Parts]:
    """The same for a trainer at hand."""
    trainer.ddp.zero_grad_buffer()
    loss, *_ = trainer._run(trainer.train, range(samples), training=True)
    for buffer in trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:  # each rank has reduced its share only
            mine = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in trained]
    for parameter in trained:
        parameter.data = parameter.main_grad
    parts = adapter_parts(trainer.model)
    for parameter, value in zip(trained, values, strict=True):
        parameter.data = value
    norm = torch.tensor(sum(float(part.double().square().sum()) for _, part in parts.values()), dtype=torch.float64)
    dist.all_reduce(norm)
    return loss, float(norm.sqrt()), parts


def adapter_parts(model: Qwen3Moe) -> Parts:
    """What this rank would write of the adapter."""
    return {shard.name: (shard.index, shard.local.clone()) for shard in model.adapter_shards() if shard.writer}


def assemble(everyone: list[Parts], shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors from every rank's parts: each element from one rank and one only."""
    whole = {name: torch.full(tuple(shape), torch.nan) for name, shape in shapes.items()}
    for parts in everyone:
        for name, (index, value) in parts.items():
            assert whole[name][index].isnan().all(), f"two ranks write {name}"
            whole[name][index] = value.float()
    assert not any(value.isnan().any() for value in whole.values()), "a part of a tensor has no writer"
    return whole


def dequantized(settings: dict[str, Any]) -> Parts:
    """This rank's parts of the weights that are kept in 4 bits, dequantized as many together as a product does."""
    _, _, model = start(settings)
    parts = {}
    for shard in model.base_shards():
        if isinstance(slot := shard.local, Slot):
            weight, e = slot.weight, slot.expert
            first, last = next(run for run in weight.runs(range(1, weight.experts + 1)) if e < run[1])
            matrix = weight.dequantize(first, last)[e - first]
            parts[shard.name] = (shard.index, matrix[weight.parts[slot.part].to_rows].clone())
    return parts


def everything(settings: dict[str, Any], samples: list[Sample], steps: int) -> dict[str, Any]:
    """Loss and gradients of one batch of all samples, then a loss curve and the adapter it ends in."""
    config, topology, model = start(settings)
    trainer = Trainer(config, topology, model, as_samples(samples))
    loss, _, gradient_parts = measure_gradients(trainer, len(samples))
    curve = [trainer.train_step() for _ in range(steps)]
    return {
        "loss": loss,
        "gradients": gradient_parts,
        "curve": [record["loss"] for record in curve],
        "norms": [record["grad_norm"] for record in curve],
        "adapter": adapter_parts(model),
    }


def loss_curve(
    settings: dict[str, Any], samples: list[Sample], steps: int, save_to: str | None = None
) -> list[dict[str, Any]]:
    """The records of so many training steps; the adapter is saved afterwards where asked."""
    config, topology, model = start(settings)
    trainer = Trainer(config, topology, model, as_samples(samples))
    records = [trainer.train_step() for _ in range(steps)]
    if save_to:
        trainer.save(Path(save_to))
    return records


def answers(
    settings: dict[str, Any], prompts: list[list[int]], count: int, sampling: dict[str, Any], stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """The tokens that this rank sees generated for each prompt, with one sampler and one cache for all of them."""
    _, _, model = start(settings)
    sampler, cache = Sampler(**sampling), KVCache()
    return [list(generate(model, prompt, count, sampler, stop, cache)) for prompt in prompts]


def answers_together(
    settings: dict[str, Any], prompts: list[list[int]], count: int, stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """The tokens that this rank sees generated for all prompts at once."""
    return answers_in_batches(settings, prompts, count, [{}], stop)[0]


def answers_in_batches(
    settings: dict[str, Any],
    prompts: list[list[int]],
    count: int,
    sizes: list[dict[str, int]],
    stop: tuple[int, ...] = (),
) -> list[list[list[int]]]:
    """The same, once for each of `sizes`, which replace constants of the module."""
    _, _, model = start(settings)
    found, before = [], {name: getattr(batch, name) for one in sizes for name in one}
    for one in sizes:
        vars(batch).update(before | one)
        model.train()
        steps: list[None] = []
        found.append(generate_many(model, prompts, count, stop, lambda steps=steps: steps.append(None)))  # type: ignore[misc]
        assert model.training
        assert steps
    return found


def evaluation(run_file: Path, overrides: list[str], generate: int | str, new: int) -> dict[str, Any]:
    """An evaluation on the run's validation data, and what the trainer measures of base and adapter on the same data."""
    config = load_config(run_file, overrides)
    topology = regroup(resolve_topology(config.data.topology, dist.get_world_size()), config.job.seed)
    model = build_model(config, topology)
    model.train()
    found = evaluate(config, model, generate=generate, max_new_tokens=new)
    assert model.training
    _, validation = load_data(config, topology)
    trainer = Trainer(config, topology, model, validation, validation)
    trained = {"adapter": trainer.evaluate(validation)}
    with without_adapters(model):
        trained["base"] = trainer.evaluate(validation)
    return {
        "values": {name: {side: one.value(side) for side in one.sums} for name, one in found.metrics.items()},
        "counts": {name: one.count for name, one in found.metrics.items()},
        "losses": {side: one.losses for side, one in found.sides.items()},
        "prompts": [question.prompt for question in found.task.questions.asked],
        "turns": [(question.conversation, question.turn) for question in found.task.questions.asked],
        "texts": {side: [answer.text for answer in one.answers] for side, one in found.sides.items()},
        "json": as_json(found) if topology.is_first else None,
        "trained": trained,
    }


def train_with_answers(run_file: Path, overrides: list[str], scripted: list[float] | None = None) -> dict[str, Any]:
    """A run whose validations have answers; with `scripted`, these are the exact matches of its validations."""
    config = load_config(run_file, overrides)
    if scripted:
        values = iter(scripted)
        ValidationAnswers.measure = lambda *_: {"exact_match": next(values)}  # type: ignore[method-assign]
    seen: list[Trainer] = []
    summary = job.run(config, seen.append)
    [trainer] = seen
    lines = [json.loads(line) for line in (Path(config.job.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert trainer.answers
    questions = trainer.answers.questions.asked
    found = {"lines": lines, "state": trainer.state, "summary": summary, "questions": questions}
    held_out = [trainer.validation[i][0].tolist() for i in range(len(trainer.validation))] if trainer.validation else []
    if config.data.validation_path and not scripted:
        after = evaluate(config, trainer.model, generate=config.training.validation.generate, max_new_tokens=8)
        found["evaluated"] = {name: one.value("adapter") for name, one in after.metrics.items()}
    return found | {"held_out": held_out}


def answers_to_prompts_in_parts(
    settings: dict[str, Any], prompts: list[list[int]], count: int, part: int
) -> list[list[int]]:
    """The same, where no more than `part` tokens of a prompt go through the model at once."""
    decode.PREFILL = part
    return answers(settings, prompts, count, {})


def cached_logits(settings: dict[str, Any], ids: list[int], lengths: list[int], forget: int) -> list[Tensor]:
    """Logits after each part of `ids`, parts of these lengths, computed behind a cache of what lies before it.

    Half-way the last `forget` tokens of the cache are replaced by others and brought back.
    """
    _, _, model = start(settings)
    model.eval()
    cache, found = KVCache(), []
    cache.reserve(3)  # grows as it fills
    for i, part in enumerate(torch.tensor(ids).split(lengths)):
        if i == len(lengths) // 2:
            whole = list(cache.tokens)
            other = [*whole[:-forget], *((token + 1) % 203 for token in whole[-forget:])]
            for prompt in (other, whole):
                kept = cache.keep([*prompt, 0])
                assert kept == len(whole) - forget
                with torch.no_grad():
                    decode._logits_after(model, prompt[kept:], cache)
        cache.reserve(len(cache.tokens) + len(part))
        with torch.no_grad():
            found.append(decode._logits_after(model, part.tolist(), cache))
    assert cache.tokens == ids
    return found


class PartialSampler(Sampler):
    """Chooses another token on each rank."""

    def choose(self, logits: Tensor) -> int:
        return dist.get_rank() + 1


def answers_of_ranks_that_disagree(settings: dict[str, Any]) -> list[int]:
    _, _, model = start(settings)
    return list(generate(model, [3, 4, 5], 4, PartialSampler()))


def answer_until_rank_0_is_interrupted(settings: dict[str, Any], at: int) -> list[int]:
    """Rank 0 hears of Ctrl-C while its `at`-th token is made."""
    _, topology, model = start(settings)
    tokens: list[int] = []
    model.train()
    for token in generate(model, [3, 4, 5], 20, interrupted=lambda: topology.is_first and len(tokens) == at):
        tokens.append(token)
    assert model.training
    return tokens
