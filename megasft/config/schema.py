"""The run file as typed settings, with errors that name file, line, key and remedy.

`load_config` reads a file and `RunConfig.from_dict` a dict; both return a `RunConfig`. The sections below are in the
order of the file, with the default and the meaning of each key. Every key is optional. Relative paths start at the
working directory. Every mistake in a run file raises a `UserError` of one line.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from megasft.config.aliases import ABSENT, FOREIGN_NAMES, SAME_SETTING, SYNONYMS
from megasft.config.parallelism import (
    TopologySettings,
    asked_ranks,
    choose_dispatcher,
    derive,
    fit,
)
from megasft.config.toml import Key, RunFile, Section, explain, parse_override, paths
from megasft.config.values import (
    LINEAR_LAYERS,
    REFERENCE_MODEL,
    BelowOne,
    Count,
    Machines,
    NotNegative,
    Positive,
    Tag,
    TargetModules,
    Text,
    as_tuple,
    check_block_size,
    check_deepspeed_stage,
    check_validation_loss,
    list_as_tuple,
    refuse_true,
)
from megasft.messages import UserError


def load_config(path: str | Path, overrides: Sequence[str] = (), dataset: str | Path | None = None) -> "RunConfig":
    """Read the run file `path`.

    `overrides` are `section.key=value` with a TOML value. They replace the file's values, and a later one replaces an
    earlier one. `dataset` replaces `job.data`. `job.output_dir` defaults to `runs/<stem of the run file>`. Raises
    UserError.
    """
    file = RunFile.read(path)
    for argument in overrides:
        key, value = parse_override(argument)
        for replaced in paths(value, key):
            if replaced in SAME_SETTING:
                file.drop(SAME_SETTING[replaced])
        file.override(key, value, f"--set {argument}")
    if dataset is not None:
        file.drop(("data", "mix"))
        file.override(("job", "data"), os.fspath(dataset), f"--dataset {dataset}")
    config = _checked(file)
    if "output_dir" not in config.job.model_fields_set:
        config = _with(config, ("job", "output_dir"), f"runs/{Path(path).stem}")
    return config


# --------------------------------------------------------------------------------------------------------------------
# The sections of the file
# --------------------------------------------------------------------------------------------------------------------


class AlgorithmSettings(Section):
    """`[algorithm]`: what kind of training; there is one."""

    type: Literal["offline"] = "offline"
    method: Literal["sft"] = "sft"
    variety: Literal["lora"] = "lora"


class JobSettings(Section):
    """`[job]`: what goes in and where the results go."""

    model: Text = REFERENCE_MODEL  # a hub id, or a folder: whatever exists, or begins with . or /
    data: Text | None = None  # the conversations to train on; `--dataset` replaces it
    output_dir: Text = "runs/run"  # the run directory; from a file, runs/<stem of the file>
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # of initialisation, order, dropout and held-out conversations
    init_adapter: Text | None = None  # a PEFT adapter to start from in place of a fresh one
    timeout_minutes: Positive = 10.0  # without progress of any rank, after which those at fault are named and all end
    deterministic: bool = False  # the same bits from the same topology, at a cost on GPUs


class ComputeSettings(Section):
    """`[compute]`: the machines the job is meant for. Ranks that are launched are held to the topology, not to this."""

    gpu_type: Text | None = None  # such as "H200"
    gpu_count: Machines | None = None  # per node
    nodes: Machines = 1


class MixSettings(Section):
    """`[[data.mix]]`: one of several files to train on together, in place of `job.data`."""

    path: Text
    weight: Positive = 1.0  # how often an epoch goes through it; 0.5: half of it, and the other half in the next epoch


class DataSettings(Section):
    """`[data]`: from conversations to batches, validation data, and the topology over which batches are spread.

    Where validation is enabled and there is no `validation_path`, `validation_fraction` of the conversations are held
    out of training, the same ones for the same `job.seed`. In a `RunConfig` from one of its two doors the fraction is
    what is really held out: 0 where validation is off or has a file of its own.
    """

    validation_path: Text | None = None
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    on_error: Literal["stop", "skip"] = "stop"  # what to do about a conversation that cannot be used
    train_on: Literal["all", "last"] = "all"  # every assistant turn, or the last of each conversation
    # what to do about a conversation of more than sequence_length tokens
    overlong: Literal["drop", "truncate_left", "truncate_right", "split_turns"] = "truncate_right"
    parse_special_in_text: bool = False  # read `<|im_end|>` and the like in messages as the tokens they name
    packing: bool = False  # fill rows of sequence_length tokens with several conversations, and count rows in batches
    cache_dir: Text | None = None  # of tokenized data; None: megasft in $XDG_CACHE_HOME or ~/.cache
    mix: Annotated[tuple[MixSettings, ...], BeforeValidator(as_tuple)] = ()
    topology: TopologySettings = TopologySettings()


class ValidationSettings(Section):
    """`[training.validation]`: when the validation loss is measured. Where enabled, one measurement closes the run."""

    enabled: bool = False  # when left out: whether [data] gives validation_path or validation_fraction
    evaluation_strategy: Literal["steps", "epoch", "no"] = "steps"  # "no": only the one that closes the run
    eval_steps: Count = 100  # optimizer steps from one to the next, for "steps"
    at_start: bool = False  # measure it before the first step as well: the loss of the base model, or of init_adapter
    save_best_model_at_end: bool = True  # keep the adapter of the lowest loss in best/
    metric_for_best_model: Annotated[str, AfterValidator(check_validation_loss)] = "val.loss"
    greater_is_better: Annotated[bool, refuse_true("a loss is better when it is smaller; set it to false")] = False


class TrainingSettings(Section):
    """`[training]`: LoRA, and over which base weights."""

    mode: Literal["lora"] = "lora"
    use_qlora: bool = False  # frozen linears and experts in 4 bits, as [quant] says
    max_nonfinite_steps: Count = 10  # steps in a row that may be skipped for a loss or gradient that is not finite
    validation: ValidationSettings = ValidationSettings()


class QuantSettings(Section):
    """`[quant]`: the 4-bit base of `[training] use_qlora`, in bitsandbytes' number format."""

    type: Literal["nf4"] = "nf4"
    double: bool = True  # quantize the scales too: 0.52 bytes a weight in place of 0.56
    block_size: Annotated[int, AfterValidator(check_block_size)] = 64  # weights of a row that share a scale
    cache_dir: Text | None = None  # of quantized checkpoints; None: megasft in $XDG_CACHE_HOME or ~/.cache
    experts_at_once: Count | None = None  # dequantized together; None: one on CPUs, a layer's on GPUs


class LoraSettings(Section):
    """`[lora]`, in peft's vocabulary: delta W = alpha / r * B A."""

    r: Count = 16
    alpha: Positive = 32.0
    dropout: BelowOne = 0.05  # of the adapter's input
    target_modules: TargetModules = ("all-linear",)  # or any of LINEAR_LAYERS; one name may stand without a list

    @property
    def targets(self) -> frozenset[str]:
        """The names of the adapted layers, `all-linear` spelled out. `gate` is the router."""
        return frozenset(LINEAR_LAYERS if "all-linear" in self.target_modules else self.target_modules)


class ParallelismSettings(Section):
    """`[hyperparameters.parallelism]`: precision and recomputation, and what files for other trainers say of sharding.

    Optimizer states are always sharded over data parallel, which is what DeepSpeed calls stage 1 and 2.
    """

    use_deepspeed: bool = False  # accepted, and without effect
    deepspeed_stage: Annotated[int | None, AfterValidator(check_deepspeed_stage)] = None  # 1 or 2, without effect
    fsdp: Annotated[bool, refuse_true("weights are sharded by [data.topology], not by FSDP; set it to false")] = False
    bf16: bool = True  # false means fp32
    fp16: Annotated[bool, refuse_true("megasft trains in bf16 or fp32; set bf16 = true, or both to false")] = False
    activation_checkpointing: bool = True  # recompute each layer in backward
    # how tokens get to their experts; "auto": the one that moves less
    token_dispatcher: Literal["auto", "alltoall", "allgather"] = "auto"


class HyperparameterSettings(Section):
    """`[hyperparameters]`: defaults as in transformers' `TrainingArguments`, where it has them.

    The global batch is `per_device_batch * gradient_accumulation_steps * data_parallel` samples: conversations, or with
    `data.packing` rows of `sequence_length` tokens that hold several. The synonyms of the `[lora]` keys are folded into
    `[lora]` on loading and are None afterwards.
    """

    n_epochs: Count = 1
    max_steps: Annotated[Count | None, BeforeValidator(lambda value: None if value == -1 else value)] = None
    per_device_batch: Count = 1  # samples in a micro batch of one data-parallel rank
    gradient_accumulation_steps: Count = 1  # micro batches in an optimizer step
    sequence_length: Count = 4096  # tokens
    learning_rate: Positive = 5e-5  # at the end of warm-up
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of all optimizer steps
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # after warm-up
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0  # 0: no clipping
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_eps: Positive = 1e-8
    router_aux_loss_coef: NotNegative = 0.0  # of the load-balancing loss; costs a forward unless 0
    expert_capacity_factor: Positive | None = None  # experts take at most so many times the mean; None: every token
    parallelism: ParallelismSettings = ParallelismSettings()

    lora_rank: Count | None = Field(default=None, exclude=True)
    lora_alpha: Positive | None = Field(default=None, exclude=True)
    lora_dropout: BelowOne | None = Field(default=None, exclude=True)
    lora_target_modules: TargetModules | None = Field(default=None, exclude=True)
    train_kind: Literal["peft", "lora"] | None = Field(default=None, exclude=True)


class CheckpointSettings(Section):
    """`[checkpoint]`."""

    every_steps: Count = 100  # optimizer steps; besides, one at each epoch's end and one at the end of the run
    every_minutes: Positive | None = None  # and whenever so long has passed since the last
    keep: Count = 3  # the newest so many, and that of the best validation loss
    resume: Text = "auto"  # go on from the newest in output_dir, if there is one; "never"; or a checkpoint's folder
    # what may differ from what the checkpoint was trained with
    allow_changed: Annotated[tuple[Literal["base", "data"], ...], BeforeValidator(list_as_tuple)] = ()
    on_failure: Literal["continue", "stop"] = "continue"  # when a checkpoint cannot be written


class LoggingSettings(Section):
    """`[logging]`."""

    every_steps: Count = 1  # optimizer steps
    experts_every_steps: Count = 100  # optimizer steps from one line of tokens per layer and expert to the next


class RunConfig(Section):
    """All settings of a run, validated and resolved. Create it with `load_config` or `RunConfig.from_dict`."""

    algorithm: AlgorithmSettings = AlgorithmSettings()
    job: JobSettings = JobSettings()
    compute: ComputeSettings = ComputeSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    quant: QuantSettings = QuantSettings()
    lora: LoraSettings = LoraSettings()
    hyperparameters: HyperparameterSettings = HyperparameterSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    tags: dict[str, Tag] = Field(default_factory=dict)  # free labels, stored with the run

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "RunConfig":
        """Validate and resolve settings nested as in the run file. Raises UserError."""
        return _checked(RunFile(settings))

    def to_toml(self) -> str:
        """The resolved settings as a run file. `load_config` of that file returns an equal RunConfig."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def training_data(self) -> tuple[MixSettings, ...]:
        """The training files and their weights. Raises UserError if neither the run file nor `--dataset` names any."""
        if self.job.data is not None:
            return (MixSettings(path=self.job.data),)
        if not self.data.mix:
            raise UserError('[job] data: no training data is named; pass --dataset FILE, or set data = "FILE" in [job]')
        return self.data.mix

    def world_size(self) -> int | None:
        """The number of ranks that the topology or else the GPUs imply; None if the file sets neither."""
        gpus = self.compute.gpu_count * self.compute.nodes if self.compute.gpu_count else None
        return asked_ranks(self.data.topology) or gpus

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """The precision of weights and activations."""
        return "bf16" if self.hyperparameters.parallelism.bf16 else "fp32"


# --------------------------------------------------------------------------------------------------------------------
# Validating and resolving
# --------------------------------------------------------------------------------------------------------------------


def _checked(file: RunFile) -> RunConfig:
    try:
        config = RunConfig.model_validate(file.settings)
    except ValidationError as error:
        aliases = {name: key for key, names in FOREIGN_NAMES.items() for name in names.split()}
        raise UserError(explain(error, file, RunConfig, aliases, ABSENT)) from None
    config = _fold_synonyms(config, file)
    if config.data.mix and config.job.data is not None:
        raise UserError(f"{file.at(('job', 'data'))}: [[data.mix]] names training data too; keep one of the two")
    config = _settle_validation(config, file)
    _check_topology(config, file)
    return config


def _fold_synonyms(config: RunConfig, file: RunFile) -> RunConfig:
    for synonym, key in SYNONYMS.items():
        value = getattr(config.hyperparameters, synonym[-1])
        if value is None:
            continue
        name = key[-1]
        if name in config.lora.model_fields_set and getattr(config.lora, name) != value:
            raise UserError(f"{file.at(synonym)}: contradicts {file.at(key)}; keep one of the two")
        config = _with(_with(config, key, value), synonym, None)
    return _with(config, ("hyperparameters", "train_kind"), None)


def _settle_validation(config: RunConfig, file: RunFile) -> RunConfig:
    """Set `enabled` if the file leaves it out, and `validation_fraction` to the share that is really held out."""
    data, validation = config.data, config.training.validation
    enabled, fraction = validation.enabled, data.validation_fraction
    if "enabled" not in validation.model_fields_set:
        enabled = bool(data.validation_path or ("validation_fraction" in data.model_fields_set and fraction))
    if not enabled or data.validation_path:
        fraction = 0.0
    elif not fraction:
        remedy = "set it above 0, name a [data] validation_path, or set [training.validation] enabled = false"
        raise UserError(f"{file.at(('data', 'validation_fraction'))}: leaves nothing to validate on; {remedy}")
    config = _with(config, ("training", "validation", "enabled"), enabled)
    return _with(config, ("data", "validation_fraction"), fraction)


def _check_topology(config: RunConfig, file: RunFile) -> None:
    """Refuse, before any rank is launched, a topology that does not fit the file's GPUs or dispatcher."""
    asked = config.hyperparameters.parallelism.token_dispatcher
    try:
        choose_dispatcher(asked, derive(config.data.topology))
    except ValueError as error:
        at = file.at(("hyperparameters", "parallelism", "token_dispatcher"))
        raise UserError(f'{at}: {error}; "alltoall" works with any topology') from None
    compute = config.compute
    ranks = compute.gpu_count * compute.nodes if compute.gpu_count else config.world_size()
    if ranks is None:
        return
    try:
        fit(config.data.topology, ranks)
    except ValueError as error:
        place = file.at(("compute", "gpu_count") if compute.gpu_count else ("data", "topology"))
        nodes = f" on {compute.nodes} nodes" if compute.nodes > 1 else ""
        raise UserError(f"{place}: makes {ranks} ranks{nodes}, but [data.topology] {error}") from None


def _with(settings: Any, key: Key, value: Any) -> Any:
    """A copy of nested settings with `key` set."""
    name, *rest = key
    return settings.model_copy(update={name: _with(getattr(settings, name), tuple(rest), value) if rest else value})
