"""What can be refused before any rank is launched, cheapest first: paths, the first records, the model's configuration
and tokenizer, adapters, and what a resumed run may not change.
"""

import os
from pathlib import Path

from megasft.config.parallelism import TopologySizes, fit, remedies
from megasft.config.schema import RunConfig
from megasft.data.records import conversation_files
from megasft.messages import UserError
from megasft.model.hub import check_name, find_model

# Files that are looked into here. pyarrow, which reads the others, has threads, and ranks may be forked from here.
_LINES = (".jsonl", ".jsonl.gz")


def topology_sizes(config: RunConfig, ranks: int) -> TopologySizes:
    """The topology on `ranks` ranks. Raises UserError naming options of `megasft train` that the model allows."""
    try:
        return fit(config.data.topology, ranks)
    except ValueError as error:
        asks = str(error).partition("; ")[0]
    _check_paths(config)
    from megasft.model.hf_config import read_config
    from megasft.model.shape import check_fits

    hf_config = read_config(find_model(config.job.model))

    def usable(sizes: TopologySizes) -> bool:
        try:
            check_fits(hf_config, sizes, config.quant if config.training.use_qlora else None)
        except UserError:
            return False
        return True

    options = remedies(config.data.topology, ranks, usable)
    remedy = f"add {', or '.join(options)}" if options else "the model has no topology near it on so many ranks"
    raise UserError(f"--ranks {ranks}: [data.topology] {asks}; {remedy}")


def check(config: RunConfig, sizes: TopologySizes) -> None:
    """Raise UserError for any input of the job that is missing or does not fit; reads no weights."""
    _check_paths(config)
    # Imported after the paths were checked: torch and transformers take seconds, and a wrong path should not.
    from megasft.checks import gpus
    from megasft.data.tokenizer import load_tokenizer
    from megasft.model.hf_checkpoint import fingerprint
    from megasft.model.hf_config import read_config
    from megasft.model.shape import check_fits
    from megasft.train import trackers
    from megasft.train.checkpoint import resume

    trackers.check(config)
    folder = find_model(config.job.model)
    hf_config = read_config(folder)
    check_fits(hf_config, sizes, config.quant if config.training.use_qlora else None)
    gpus.check_size(config, hf_config)
    if config.training.use_qlora:
        from megasft.quant import kernels

        kernels.require()
    load_tokenizer(folder, config.data.template_args).check_vocabulary(hf_config.vocab_size)
    resume.check(config, fingerprint(folder), sizes.data)
    if config.job.init_adapter:
        from megasft.adapters.adapter_file import AdapterFile
        from megasft.adapters.fit import fitting_pairs, warn_of_other_base

        adapter = AdapterFile(config.job.init_adapter)
        fitting_pairs(adapter, config.lora, hf_config)
        warn_of_other_base(adapter, config.job.model)


def check_gpus(config: RunConfig, ranks: int) -> None:
    """Raise UserError unless this machine has the GPUs that the run file and `ranks` ranks on it ask for."""
    from megasft.checks import gpus

    gpus.check_count(config, ranks)


def _check_paths(config: RunConfig) -> None:
    key = "[[data.mix]] path" if config.data.mix else "[job] data"
    paths = [(key, source.path) for source in config.training_data()]
    for key, path in [*paths, ("[data] validation_path", config.data.validation_path)]:
        try:
            if path:
                check_data(path, config.data.on_error == "stop")
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


def check_data(path: str, stops: bool) -> None:
    """Raise UserError where there is no conversation, or the first cannot be used and the run `stops` at such."""
    from megasft.data.conversations import Problem, check_record
    from megasft.data.records import read_records

    files = conversation_files(path)
    for file in files:
        if not file.name.endswith(_LINES):
            if file.stat().st_size:
                return
            continue
        first = next(read_records(file), None)
        if first is None:
            continue
        line, record, begin = first
        found = check_record(record, str(file), line, begin)
        if stops and isinstance(found, Problem):
            raise UserError(str(found))
        return
    raise UserError(f"{path}: holds no conversation; each line of a .jsonl file is one")
