"""A job from its run file to its adapter, in the steps a research script can also take one by one."""

import os
from pathlib import Path

from megasft import topology as topologies
from megasft.config import RunConfig, resolve_topology
from megasft.data.dataset import Samples, load_samples, share_samples
from megasft.data.tokenizer import load_tokenizer
from megasft.errors import UserError
from megasft.lora.adapter import initialize_adapter, load_adapter
from megasft.model import qwen3_moe
from megasft.model.hub import find_model
from megasft.model.weights import load_base
from megasft.topology import Topology
from megasft.train.trainer import Summary, Trainer


def run(config: RunConfig) -> Summary:
    """Train as `config` says; every rank calls it."""
    config.require_data()
    topology = initialize(config)
    # The data before the weights: a bad line is found in seconds.
    train, validation = load_data(config, topology)
    model = build_model(config, topology)
    return Trainer(config, topology, model, train, validation).fit()


def initialize(config: RunConfig) -> Topology:
    """Join the ranks that were launched (one, without torchrun) in the topology of `config`.

    Raises UserError if it does not fit the number of ranks.
    """
    sizes = resolve_topology(config.data.topology, int(os.environ.get("WORLD_SIZE", 1)))
    return topologies.start(sizes, config.job.seed)


def build_model(config: RunConfig, topology: Topology) -> qwen3_moe.Qwen3Moe:
    """The model with its base weights and with fresh adapters, or those of `[job] init_adapter`."""
    with topology.together():
        folder = find_model(config.job.model)
        hf_config = qwen3_moe.read_config(folder)
        qwen3_moe.check_fits(hf_config, topology.sizes)
    dtype = qwen3_moe.DTYPES[config.dtype]
    recompute = config.hyperparameters.parallelism.activation_checkpointing
    model = qwen3_moe.build_model(hf_config, topology, config.lora, dtype, recompute)
    with topology.together():
        load_base(model, folder)
        if config.job.init_adapter:
            load_adapter(model, config.job.init_adapter)
        else:
            initialize_adapter(model, config.job.seed)
    return model


def load_data(config: RunConfig, topology: Topology) -> tuple[Samples, Samples | None]:
    """(training, validation) samples; rank 0 reads and tokenizes, the others receive."""
    train = validation = None
    settings = config.training.validation
    with topology.together():
        if topology.is_first:
            folder = find_model(config.job.model)
            tokenizer = load_tokenizer(folder)
            tokenizer.check_vocabulary(qwen3_moe.read_config(folder).vocab_size)
            length = config.hyperparameters.sequence_length
            train = load_samples(config.require_data(), tokenizer, length)
            if settings.enabled and config.data.validation_path:
                validation = load_samples(config.data.validation_path, tokenizer, length)
            elif settings.enabled:
                train, validation = train.split(config.data.validation_fraction, config.job.seed)
    train = share_samples(train, topology)
    return train, share_samples(validation, topology) if settings.enabled else None


def check_before_launch(config: RunConfig) -> None:
    """All that can be refused without a rank: paths that are not there, a model that does not fit the topology."""
    for key, path in (("data", config.require_data()), ("init_adapter", config.job.init_adapter)):
        if path and not Path(path).exists():
            raise UserError(f"[job] {key} = {path!r}: no such file or folder")
    if config.data.validation_path and not Path(config.data.validation_path).exists():
        raise UserError(f"[data] validation_path = {config.data.validation_path!r}: no such file or folder")
