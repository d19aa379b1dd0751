"""A job from its run file to its adapter, in the steps a research script can also take one by one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasft import host, preflight
from megasft.adapters.model_io import initialize_adapter, load_adapter
from megasft.config.parallelism import resolve_topology
from megasft.config.schema import LoraSettings, QuantSettings, RunConfig
from megasft.data.dataset import Mix, Samples
from megasft.data.token_cache import prepare
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer import load_tokenizer
from megasft.distributed.nodes import on_each_node
from megasft.distributed.topology import Topology, join_world
from megasft.model import quantized_base as quantized
from megasft.model import qwen3_moe
from megasft.model.hf_config import DTYPES, check_fits, read_config
from megasft.model.hub import find_model
from megasft.model.load_base import load_base
from megasft.train.checkpoint import resume, run_lock
from megasft.train.trainer import Summary, Trainer, global_batches


def run(config: RunConfig, on_start: Callable[[Trainer], None] = lambda _: None) -> Summary:
    """Train as `config` says; every rank calls it. `on_start` is given the trainer before its first step."""
    topology = initialize(config)
    with topology.together():
        if topology.is_first:
            preflight.check(config, topology.sizes)
            run_lock.refuse_second(config.job.output_dir)
    # Data before weights: a bad line, or other data than the checkpoint's, is found in seconds.
    train, validation = load_data(config, topology)
    with topology.together():
        if topology.is_first:
            resume.check_data(config, train, global_batches(config, topology, train))
    model = build_model(config, topology)
    trainer = Trainer(config, topology, model, train, validation)
    return trainer.fit(lambda: on_start(trainer))


def initialize(config: RunConfig) -> Topology:
    """Join the ranks that were launched (one, without torchrun) in the topology of `config`.

    Raises UserError if it does not fit the number of ranks.
    """
    sizes = resolve_topology(config.data.topology, int(os.environ.get("WORLD_SIZE", 1)))
    if config.job.deterministic:
        host.be_deterministic()
    # Longer than the watchdog's limit, which can name the rank that hangs.
    return join_world(sizes, config.job.seed, max(30.0, 2 * config.job.timeout_minutes))


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
    folders = on_each_node(topology, lambda: _tokenized(config, [path] if validates and path else []))
    sources = [Samples.open(folder) for folder in folders]
    weights = [source.weight for source in config.training_data()]
    train = Mix(tuple(sources[: len(weights)]), tuple(weights))
    if not validates:
        return train, None
    if path:
        return train, Mix.of(sources[-1])
    return train.split(config.data.validation_fraction, config.job.seed)


def _tokenized(config: RunConfig, more: list[str]) -> list[Path]:
    """The token cache's folders of the training data and of `more` files; those missing are made."""
    folder = find_model(config.job.model)
    tokenizer = load_tokenizer(folder)
    tokenizer.check_vocabulary(read_config(folder).vocab_size)
    data = config.data
    recipe = Recipe(config.hyperparameters.sequence_length, data.train_on, data.overlong, data.parse_special_in_text)
    paths = [*(source.path for source in config.training_data()), *more]
    return [prepare(path, tokenizer, recipe, data.on_error, data.cache_dir) for path in paths]
