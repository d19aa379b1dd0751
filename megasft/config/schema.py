"""The run file as typed settings, with errors that name file, line, key and remedy.

`load_config` reads a file and `RunConfig.from_dict` a dict; both return a `RunConfig`. The sections below are in the
order of the file, with the default and the meaning of each key. Every key is optional. Relative paths start at the
working directory. Every mistake in a run file raises a `UserError` of one line.
"""

import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from megasft.config.aliases import ABSENT, FOREIGN_NAMES, SAME_SETTING
from megasft.config.measures import SCORES, check_metric
from megasft.config.parallelism import TopologySettings, asked_ranks
from megasft.config.resolve import changed, check_topology, fold_synonyms, settle_validation
from megasft.config.toml import RunFile, Section, explain, parse_override, paths
from megasft.config.values import (
    ALL_LINEAR,
    REFERENCE_MODEL,
    BelowOne,
    Count,
    Machines,
    NotNegative,
    Positive,
    Recompute,
    Tag,
    TargetModules,
    Text,
    as_tuple,
    check_block_size,
    check_deepspeed_stage,
    check_json,
    check_recompute,
    iso_date,
    list_as_tuple,
    names_as_tuple,
    one_or_list_as_tuple,
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
    _override(file, overrides)
    if dataset is not None:
        file.drop(("data", "mix"))
        file.override(("job", "data"), os.fspath(dataset), f"--dataset {dataset}")
    config = _checked(file)
    if "output_dir" not in config.job.model_fields_set:
        config = changed(config, ("job", "output_dir"), f"runs/{Path(path).stem}")
    return config


# --------------------------------------------------------------------------------------------------------------------
# The sections of the file
# --------------------------------------------------------------------------------------------------------------------


class AlgorithmSettings(Section):
    """`[algorithm]`: the kind of training. Each key has one value; files for other trainers name it."""

    type: Literal["offline"] = "offline"  # training on a fixed data set
    method: Literal["sft"] = "sft"  # supervised fine-tuning
    variety: Literal["lora"] = "lora"  # low-rank adapters over frozen weights


class JobSettings(Section):
    """`[job]`: the inputs, and where the results go."""

    model: Text = REFERENCE_MODEL  # base model: a Hugging Face hub id or a folder
    data: Text | None = None  # training conversations; `--dataset` overrides it
    output_dir: Text = "runs/run"  # run directory; default for `my.toml`: `runs/my`
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # of initialization, data order, dropout and the validation split
    init_adapter: Text | None = None  # folder of a PEFT adapter to start from, instead of a fresh one
    timeout_minutes: Positive = 10.0  # after so long without progress, name the hanging ranks and end the job
    deterministic: bool = False  # bitwise reproducible runs on GPUs, where this is slower; on CPUs runs always are


class ComputeSettings(Section):
    """`[compute]`: the machines the job is meant for."""

    gpu_type: Text | None = None  # such as `"H200"`: a run on another GPU, or on none, is refused
    # GPUs per node; fewer are refused, and `[data.topology]` must fit `gpu_count` x `nodes` ranks. 0: train on CPUs
    gpu_count: Annotated[int, Field(ge=0, lt=2**15)] | None = None
    nodes: Machines = 1  # number of nodes
    ignore_plan: bool = False  # launch although `megasft plan` says that the job does not fit the GPUs' free memory


class MixSettings(Section):
    """`[[data.mix]]`: one of several data sets to train on together, instead of `[job] data`."""

    path: Text  # a conversation file or a folder of them
    weight: Positive = 1.0  # passes through it per epoch; 0.5: one half in this epoch, the other in the next


class DataSettings(Section):
    """`[data]`: how conversations become batches, and the validation data. See batches.md."""

    validation_path: Text | None = None  # conversations to validate on
    # share of the training conversations to hold out for validation where there is no `validation_path`; the same
    # ones for the same `[job] seed`
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    # a conversation that cannot be used: `"stop"` ends the run and names the line, `"skip"` leaves it out and says so
    on_error: Literal["stop", "skip"] = "stop"
    train_on: Literal["all", "last"] = "all"  # supervise every assistant turn, or the last of each conversation
    # a conversation longer than `sequence_length`: drop it, cut its start or its end, or split it between turns
    overlong: Literal["drop", "truncate_left", "truncate_right", "split_turns"] = "truncate_right"
    # encode `<|im_end|>` and other control tokens in the text of messages as those tokens
    parse_special_in_text: bool = False
    # variables for the chat template, such as `{ enable_thinking = false }`; a record's `chat_template_kwargs` override
    # them
    template_args: Annotated[dict[str, Any], AfterValidator(check_json)] = Field(default_factory=dict)
    # the date that a chat template which writes today's date gets; default: the day on which the run began
    template_date: Annotated[date | None, BeforeValidator(iso_date)] = None
    # where the chat template leaves out a supervised message's reasoning: `"refuse"` the conversation, or `"accept"`
    # it and train without the reasoning
    lost_reasoning: Literal["refuse", "accept"] = "refuse"
    # keys of records and messages to ignore though they may carry meaning; harmless ones need not be listed
    ignore_keys: Annotated[tuple[str, ...], BeforeValidator(names_as_tuple)] = ()
    # put several conversations into each row of `sequence_length` tokens; batches then count rows
    packing: bool = False
    # cache of tokenized data; default `~/.cache/megasft`, or `megasft` in `$XDG_CACHE_HOME`
    cache_dir: Text | None = None
    mix: Annotated[tuple[MixSettings, ...], BeforeValidator(as_tuple)] = ()  # several data sets: see `[[data.mix]]`
    topology: TopologySettings = TopologySettings()


class ValidationSettings(Section):
    """`[training.validation]`: when to validate, and which is best. If enabled, a run also ends with a validation."""

    enabled: bool = False  # if left out: true where `[data]` sets `validation_path` or `validation_fraction`
    evaluation_strategy: Literal["steps", "epoch", "no"] = "steps"  # `"no"`: only after the last step
    eval_steps: Count = 100  # optimizer steps between validations, for `"steps"`
    at_start: bool = False  # also validate before the first step: the loss of the base model, or of `init_adapter`
    save_best_model_at_end: bool = True  # keep the adapter of the best validation in `best/`
    # end the run when so many validations in a row were no better than the best before; default: never
    early_stopping_patience: Count | None = None
    generate: Annotated[int, Field(ge=0, lt=2**31)] = 0  # validation conversations whose turns are answered and scored
    max_new_tokens: Count = 256  # the longest of these answers, in tokens
    # what decides which validation is best: `val.loss`, `val.perplexity`, `val.token_accuracy`, or with `generate`
    # one of the answers' scores, such as `val.exact_match` and `val.call_match` (see evaluate.md)
    metric_for_best_model: Annotated[str, AfterValidator(check_metric)] = "val.loss"
    # whether a greater value of it is better; default: false for the loss, the perplexity, `val.unasked_call` and
    # `val.cut_off`, true for the others
    greater_is_better: bool | None = None

    def is_better(self, value: float | None, best: float | None) -> bool:
        """Whether a value of `metric_for_best_model` is better than the best so far, if there are both."""
        if value is None or best is None:
            return value is not None
        return value > best if self.greater_is_better else value < best

    @property
    def measure(self) -> str:
        """What two validations must share for one to be better than the other."""
        scored = self.metric_for_best_model.removeprefix("val.") in SCORES
        asked = f" of {self.generate} conversations, {self.max_new_tokens} tokens each" if scored else ""
        return f"{self.metric_for_best_model}{asked}{', greater' if self.greater_is_better else ''}"


class TrainingSettings(Section):
    """`[training]`: LoRA, over a 16-bit or a 4-bit base."""

    mode: Literal["lora"] = "lora"  # the only mode
    use_qlora: bool = False  # QLoRA: keep the frozen linear layers and all experts in 4 bits, as `[quant]` says
    max_nonfinite_steps: Count = 10  # stop after so many skipped steps in a row (loss or gradient not finite)
    validation: ValidationSettings = ValidationSettings()


class QuantSettings(Section):
    """`[quant]`: the 4-bit base of `[training] use_qlora`, in bitsandbytes' number format."""

    type: Literal["nf4"] = "nf4"  # the only type
    double: bool = True  # double quantization: quantize the scales too, 0.52 bytes per weight instead of 0.56
    # weights that share a scale: 32, 64, ..., 4096. It must divide the inputs of each layer on a rank
    block_size: Annotated[int, AfterValidator(check_block_size)] = 64
    # cache of quantized checkpoints; default `~/.cache/megasft`, or `megasft` in `$XDG_CACHE_HOME`
    cache_dir: Text | None = None
    experts_at_once: Count | None = None  # experts to dequantize together; default: 1 on CPUs, all of a layer on GPUs


class LoraSettings(Section):
    """`[lora]`: the adapters, in peft's vocabulary. The update of a weight is (alpha / r) B A."""

    r: Count = 16  # rank
    alpha: Positive = 32.0  # the update is scaled by alpha / r
    dropout: BelowOne = 0.05  # on the adapter's input, in training
    # layers with an adapter: `"all-linear"`, which is `q_proj` `k_proj` `v_proj` `o_proj` `gate_proj` `up_proj`
    # `down_proj`, or any of these; `"gate"` beside them adds the router, whose LoRA servers do not apply (adapters.md)
    target_modules: TargetModules = ("all-linear",)

    @property
    def targets(self) -> frozenset[str]:
        """The names of the adapted layers, `all-linear` spelled out. `gate` is the router."""
        names = frozenset(self.target_modules)
        return names - {"all-linear"} | set(ALL_LINEAR) if "all-linear" in names else names


class ParallelismSettings(Section):
    """`[hyperparameters.parallelism]`: precision, recomputation and the token dispatcher.

    The keys of DeepSpeed and FSDP are accepted so that files for other trainers load. Gradients and optimizer states
    are always sharded over data parallel, as DeepSpeed's stage 2 does.
    """

    use_deepspeed: bool = False  # has no effect
    deepspeed_stage: Annotated[int | None, AfterValidator(check_deepspeed_stage)] = None  # 1 or 2; has no effect
    # false is the only value: `[data.topology]` says how weights are sharded
    fsdp: Annotated[bool, refuse_true("weights are sharded by [data.topology], not by FSDP; set it to false")] = False
    bf16: bool = True  # false trains in fp32
    # false is the only value
    fp16: Annotated[bool, refuse_true("megasft trains in bf16 or fp32; set bf16 = true, or both to false")] = False
    # recompute each layer in backward instead of keeping its activations; `"selective"`: only its router and experts
    # (or dense MLP), and keep those of attention; `false`: keep all
    activation_checkpointing: Annotated[Recompute, BeforeValidator(check_recompute)] = True
    # how tokens get to their experts; `"auto"` takes the one that sends less (see parallelism.md)
    token_dispatcher: Literal["auto", "alltoall", "allgather"] = "auto"


class HyperparameterSettings(Section):
    """`[hyperparameters]`: batches, optimizer and schedule. Defaults are those of transformers' `TrainingArguments`.

    The global batch is `per_device_batch` x `gradient_accumulation_steps` x `data_parallel` samples: conversations, or
    with `[data] packing` rows that hold several. `lora_rank`, `lora_alpha`, `lora_dropout` and `lora_target_modules`
    are accepted here too and set the keys of `[lora]`; `train_kind` may be `"lora"` or `"peft"`.
    """

    n_epochs: Count = 1  # passes through the training data
    # optimizer steps after which the run ends, if the epochs are not over before; -1: no limit
    max_steps: Annotated[Count | None, BeforeValidator(lambda value: None if value == -1 else value)] = None
    per_device_batch: Count = 1  # samples in a micro batch of one data-parallel rank
    gradient_accumulation_steps: Count = 1  # micro batches per optimizer step
    sequence_length: Count = 4096  # tokens of the longest sample, and of a packed row
    learning_rate: Positive = 5e-5  # peak, at the end of warm-up
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of all optimizer steps spent on linear warm-up
    # after warm-up; linear and cosine decay to 0
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: NotNegative = 0.0  # AdamW's decoupled weight decay
    max_grad_norm: NotNegative = 1.0  # clip the global gradient norm to this; 0: no clipping
    adam_beta1: BelowOne = 0.9  # decay of the first moment
    adam_beta2: BelowOne = 0.999  # decay of the second moment
    adam_eps: Positive = 1e-8  # added to the denominator
    # weight of the load-balancing loss; above 0, each step runs one more forward
    router_aux_loss_coef: NotNegative = 0.0
    # an expert takes at most so many times the mean number of tokens; default: no token is dropped
    expert_capacity_factor: Positive | None = None
    parallelism: ParallelismSettings = ParallelismSettings()

    lora_rank: Count | None = Field(default=None, exclude=True)
    lora_alpha: Positive | None = Field(default=None, exclude=True)
    lora_dropout: BelowOne | None = Field(default=None, exclude=True)
    lora_target_modules: TargetModules | None = Field(default=None, exclude=True)
    train_kind: Literal["peft", "lora"] | None = Field(default=None, exclude=True)


class CheckpointSettings(Section):
    """`[checkpoint]`: when to save, what to keep, and where to resume. See checkpoints.md."""

    every_steps: Count = 100  # optimizer steps between checkpoints; epochs and the run end with one too
    every_minutes: Positive | None = None  # also save when so many minutes have passed since the last checkpoint
    keep: Count = 3  # keep the newest so many, and the checkpoint of the best validation
    # `"auto"`: resume from the newest checkpoint in `output_dir`, if any; `"never"`; or the folder of a checkpoint
    resume: Text = "auto"
    # resume although the base model or the data are not those of the checkpoint
    allow_changed: Annotated[tuple[Literal["base", "data"], ...], BeforeValidator(list_as_tuple)] = ()
    on_failure: Literal["continue", "stop"] = "continue"  # if a checkpoint cannot be written


class LoggingSettings(Section):
    """`[logging]`: how often `metrics.jsonl` gets a line, and which trackers get the numbers too. See metrics.md."""

    every_steps: Count = 1  # optimizer steps between lines of kinds `train`, `norms` and `devices`
    to: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(one_or_list_as_tuple)
    ] = ("tensorboard",)  # trackers that get all numbers; each but TensorBoard is an extra of its name to install
    project: Text = "megasft"  # the project of the trackers, MLflow's experiment
    run_name: Text | None = None  # the run's name in the trackers; default: the last part of `output_dir`
    experts_every_steps: Count = 100  # optimizer steps between lines of kind `experts` (tokens per layer and expert)
    # validation prompts that base model and adapter answer at the end, in at most 128 tokens, for dashboard and report
    answers: Annotated[int, Field(ge=0, le=64)] = 0


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

    def overridden(self, overrides: Sequence[str]) -> "RunConfig":
        """A copy with `section.key=value` arguments applied, as by `load_config`. Raises UserError."""
        if not overrides:
            return self
        file = RunFile(self.model_dump(exclude_none=True))
        _override(file, overrides)
        return _checked(file)

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


def _override(file: RunFile, overrides: Sequence[str]) -> None:
    for argument in overrides:
        key, value = parse_override(argument)
        for replaced in paths(value, key):
            if replaced in SAME_SETTING:
                file.drop(SAME_SETTING[replaced])
        file.override(key, value, f"--set {argument}")


def _checked(file: RunFile) -> RunConfig:
    try:
        config = RunConfig.model_validate(file.settings)
    except ValidationError as error:
        aliases = {name: key for key, names in FOREIGN_NAMES.items() for name in names.split()}
        raise UserError(explain(error, file, RunConfig, aliases, ABSENT)) from None
    config = fold_synonyms(config, file)
    if config.data.mix and config.job.data is not None:
        raise UserError(f"{file.at(('job', 'data'))}: [[data.mix]] names training data too; keep one of the two")
    config = settle_validation(config, file)
    check_topology(config, file)
    return config
