"""What can be refused without a rank, cheapest first: paths, the model's configuration and tokenizer, files."""

import os
from pathlib import Path

from megasft.config.parallelism import TopologySizes
from megasft.config.schema import RunConfig
from megasft.data.records import conversation_files
from megasft.messages import UserError
from megasft.model.hub import check_name, find_model


def check(config: RunConfig, sizes: TopologySizes) -> None:
    """Raise UserError for any input of the job that is missing or does not fit; reads no data and no weights."""
    _check_paths(config)
    # Imported after the paths were checked: transformers and megatron-core take seconds, a wrong path should not.
    from megasft.adapters.adapter_file import AdapterFile
    from megasft.data.tokenizer import load_tokenizer
    from megasft.model.hf_checkpoint import fingerprint
    from megasft.model.hf_config import check_fits, read_config
    from megasft.quant import kernels
    from megasft.train.checkpoint import resume

    folder = find_model(config.job.model)
    hf_config = read_config(folder)
    check_fits(hf_config, sizes, config.quant if config.training.use_qlora else None)
    if config.training.use_qlora:
        kernels.require()
    load_tokenizer(folder).check_vocabulary(hf_config.vocab_size)
    resume.check(config, fingerprint(folder), sizes.data)
    if config.job.init_adapter:
        AdapterFile(config.job.init_adapter)


def _check_paths(config: RunConfig) -> None:
    key = "[[data.mix]] path" if config.data.mix else "[job] data"
    paths = [(key, source.path) for source in config.training_data()]
    for key, path in [*paths, ("[data] validation_path", config.data.validation_path)]:
        try:
            if path:
                conversation_files(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    check_name(config.job.model)
    adapter = config.job.init_adapter
    if adapter and not Path(adapter).is_dir():
        raise UserError(f"[job] init_adapter = {adapter!r}: no such folder; name one that holds a PEFT adapter")
    wanted = Path(config.job.output_dir).absolute()
    exists = next(path for path in (wanted, *wanted.parents) if os.path.exists(path))
    if not (exists.is_dir() and os.access(exists, os.W_OK | os.X_OK)):
        kind = "is not writable" if exists.is_dir() else "is not a folder"
        raise UserError(f"[job] output_dir = {config.job.output_dir!r}: {exists} {kind}; name a folder to write to")
