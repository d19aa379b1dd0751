"""A job from its run file to its adapter, in the steps a research script can also take one by one."""

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasft import host
from megasft.adapters.model_io import initialize_adapter, load_adapter
from megasft.adapters.peft_layout import SERVED_ROUTER
from megasft.board.about import write_about
from megasft.board.answers import write_answers
from megasft.checks import gpus, preflight
from megasft.config.parallelism import resolve_topology
from megasft.config.schema import LoraSettings, QuantSettings, RunConfig
from megasft.config.values import ROUTER
from megasft.data.dataset import Mix, Samples
from megasft.data.token_cache import prepare
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer import load_tokenizer, mentions_date
from megasft.distributed.nodes import on_each_node
from megasft.distributed.topology import Topology, join_world
from megasft.messages import say
from megasft.model import quantized_base as quantized
from megasft.model import qwen3_moe
from megasft.model.hf_checkpoint import Checkpoint, untie_different_head
from megasft.model.hf_config import DTYPES, read_config
from megasft.model.hub import find_model
from megasft.model.load_base import load_base
from megasft.model.positions import longest_input
from megasft.model.shape import check_fits
from megasft.train.checkpoint import resume, run_lock
from megasft.train.trainer import Summary, Trainer, global_batches
from megasft.train.validation_answers import ValidationAnswers


def run(config: RunConfig, on_start: Callable[[Trainer], None] = lambda _: None) -> Summary:
    """Train as `config` says; every rank calls it. `on_start` is given the trainer before its first step."""
    topology = initialize(config)
    with topology.together():
        if topology.is_first:
            preflight.check(config, topology.sizes)
            run_lock.refuse_second(config.job.output_dir)
        if host.CUDA:
            gpus.check_memory(config, read_config(find_model(config.job.model)), topology.world)
    if topology.is_first and ROUTER in config.lora.targets:
        say(
            f"[lora] target_modules has {ROUTER}, the router: of such an adapter, {SERVED_ROUTER}; "
            "`megasft merge` keeps it for any server"
        )
    config = settle_date(config, topology)
    # Data before weights: a bad line, or other data than the checkpoint's, is found in seconds.
    train, validation = load_data(config, topology)
    with topology.together():
        if topology.is_first:
            resume.check_data(config, train, global_batches(config, topology, train))
    answers = None if validation is None else ValidationAnswers.prepare(config, topology, validation)
    model = build_model(config, topology)
    trainer = Trainer(config, topology, model, train, validation, answers=answers)
    if topology.is_first and trainer.schedule.shortened:
        say(trainer.schedule.shortened)

    def start() -> None:
        write_about(trainer, topology)
        on_start(trainer)

    summary = trainer.fit(start)
    write_answers(trainer, topology)
    return summary


def initialize(config: RunConfig) -> Topology:
    """Join the ranks that were launched (one, without torchrun) in the topology of `config`.

    Raises UserError if it does not fit the number of ranks, or the GPUs are not those that `config` asks for.
    """
    gpus.check_count(config, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    sizes = resolve_topology(config.data.topology, int(os.environ.get("WORLD_SIZE", 1)))
    if config.job.deterministic:
        host.be_deterministic()
    host.prepare()
    gpus.check_kind(config)
    # Longer than the watchdog's limit, which can name the rank that hangs.
    return join_world(sizes, config.job.seed, max(30.0, 2 * config.job.timeout_minutes))


def settle_date(config: RunConfig, topology: Topology) -> RunConfig:
    """The settings with the day that a chat template which writes today's date is told; every rank calls it.

    It is the one on which the run began, or the samples would be others on the day on which it is resumed.
    """
    found: list[date | None] = [config.data.template_date]
    with topology.together():
        if topology.is_first and found[0] is None and mentions_date(folder := find_model(config.job.model)):
            found = [resume.template_date(config) or date.today()]
            tokenizer = load_tokenizer(folder, config.data.template_args, found[0])
            if tokenizer.writes_date:
                say(
                    f"the chat template of {tokenizer.source} writes today's date; this run keeps {found[0]}, on "
                    "whatever day it is resumed ([data] template_date sets another)"
                )
    dist.broadcast_object_list(found)
    data = config.data.model_copy(update={"template_date": found[0]})
    return config.model_copy(update={"data": data}) if found[0] != config.data.template_date else config


def build_model(config: RunConfig, topology: Topology) -> qwen3_moe.Qwen3Moe:
    """The model with its base weights and with fresh adapters, or those of `[job] init_adapter`."""
    job, dtype = config.job, DTYPES[config.dtype]
    hyper, parallel = config.hyperparameters, config.hyperparameters.parallelism
    return load_model(
        job.model,
        topology,
        dtype,
        config.lora,
        job.init_adapter,
        job.seed,
        recompute=parallel.activation_checkpointing,
        dispatcher=parallel.token_dispatcher,
        capacity_factor=hyper.expert_capacity_factor,
        quant=config.quant if config.training.use_qlora else None,
    )


def load_model(
    name: str,
    topology: Topology,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
    adapter: str | None = None,
    seed: int = 0,
    quant: QuantSettings | None = None,
    **settings: Any,
) -> qwen3_moe.Qwen3Moe:
    """The base model `name`, a folder or hub id, with the adapter in the folder `adapter`, else fresh adapters if
    `lora` names targets; with `quant` over a 4-bit base. `settings` go to `qwen3_moe.build_model`. Raises UserError on
    every rank.
    """
    with topology.together():
        folder = find_model(name)
        hf_config = read_config(folder)
        check_fits(hf_config, topology.sizes, quant)
        untie_different_head(hf_config, Checkpoint(folder))
    model = qwen3_moe.build_model(hf_config, topology, lora, dtype, quant=quant, **settings)
    with topology.together():
        # Adapter before weights: one that does not fit is refused before a large file is read.
        if adapter:
            load_adapter(model, adapter)
        elif lora:
            initialize_adapter(model, seed)
    cached = on_each_node(topology, lambda: quantized.prepare(folder, hf_config, quant)) if quant else None
    with topology.together():
        load_base(model, folder, quantized.QuantizedCheckpoint(cached, hf_config, quant) if cached and quant else None)
    return model


def load_data(config: RunConfig, topology: Topology) -> tuple[Mix, Mix | None]:
    """(training, validation) samples, mapped into memory; one rank of each node tokenizes what is not in the cache."""
    validates, path = config.training.validation.enabled, config.data.validation_path
    paths = [*(source.path for source in config.training_data()), *([path] if validates and path else [])]
    folders = on_each_node(topology, lambda: _tokenized(config, paths))
    sources = [Samples.open(folder, path) for folder, path in zip(folders, paths, strict=True)]
    weights = [source.weight for source in config.training_data()]
    train = Mix(tuple(sources[: len(weights)]), tuple(weights))
    if topology.is_first:
        _warn_of_positions(config, sources)
    if not validates:
        return train, None
    if path:
        return train, Mix.of(sources[-1])
    return train.split(config.data.validation_fraction, config.job.seed)


def _tokenized(config: RunConfig, paths: list[str]) -> list[Path]:
    """The token cache's folders of these conversations; those missing are made."""
    folder = find_model(config.job.model)
    data, recipe = config.data, Recipe.of(config)
    tokenizer = load_tokenizer(folder, data.template_args, data.template_date)
    tokenizer.check_vocabulary(read_config(folder).vocab_size)
    return [prepare(path, tokenizer, recipe, data.on_error, data.cache_dir) for path in paths]


def _warn_of_positions(config: RunConfig, sources: list[Samples]) -> None:
    """Say so where samples are longer than what the model was made for."""
    positions = longest_input(find_model(config.job.model))
    if positions is None or config.hyperparameters.sequence_length <= positions:
        return
    beyond = sum(int((source.lengths >= positions).sum()) for source in sources)  # lengths are without the last token
    if beyond:
        say(
            f"{beyond:,} of {sum(map(len, sources)):,} samples are longer than the {positions:,} positions that "
            f"{config.job.model} was made for (max_position_embeddings, with its rope scaling); set [hyperparameters] "
            f"sequence_length = {positions}, or add rope scaling to the model's config.json"
        )
