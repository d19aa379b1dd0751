import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.config.aliases import ABSENT, FOREIGN_NAMES
from megasft.config.parallelism import TopologySettings, TopologySizes, resolve_topology
from megasft.config.schema import MixSettings, RunConfig, load_config
from megasft.config.toml import _known_keys, key_lines
from megasft.config.values import short_targets
from megasft.messages import UserError

CONFIGS = Path(__file__).parents[2] / "configs"

SMALL_FILE = """\
[algorithm]
type = "offline"
method = "sft"
variety = "lora"
[compute]
gpu_type = "H200"
gpu_count = 4
[data.topology]
tensor_parallel = 2
data_parallel = 2
[training]
mode = "lora"
use_qlora = true
[lora]
r = 16
alpha = 32
dropout = 0.05
target_modules = ["all-linear"]
"""

LARGE_FILE = """\
[algorithm]
type = "offline"
method = "sft"
variety = "lora"
[job]
model = "Qwen/Qwen3-Coder-30B-A3B-Instruct"
data = "traces/crafter_sft_converted.jsonl"
[compute]
gpu_type = "H200"
gpu_count = 2
nodes = 1
[data]
topology = {}
[training]
mode = "lora"
use_qlora = true
[training.validation]
enabled = true
evaluation_strategy = "steps"
eval_steps = 100
save_best_model_at_end = true
metric_for_best_model = "val.loss"
greater_is_better = false
[hyperparameters]
n_epochs = 1
train_kind = "peft"
per_device_batch = 1
gradient_accumulation_steps = 64
sequence_length = 4096
learning_rate = 5e-6
warmup_ratio = 0.03
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.05
lora_target_modules = ["all-linear"]
[hyperparameters.parallelism]
use_deepspeed = true
deepspeed_stage = 2
fsdp = false
bf16 = true
fp16 = false
activation_checkpointing = true
[tags]
experiment = "crafter_sft_lora_qwen_coder_30b"
"""

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EVERY_LAYER = ALL_LINEAR | {"gate"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a run file to an empty working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "job.toml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_file


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def load_refusal(write, text, overrides=(), **named) -> str:
    return refusal(load_config, write(text), overrides, **named)


def table(section: str, key: str, toml_value: str) -> str:
    return f"[{section}]\n{key} = {toml_value}\n"


# What is left out


def test_an_empty_file_is_the_reference_model_with_the_defaults_of_transformers_and_the_reference_adapter(write):
    config = load_config(write("", "first-try.toml"))
    assert config.job.model == "Qwen/Qwen3-Coder-30B-A3B-Instruct"
    assert config.job.data is None
    assert config.job.output_dir == "runs/first-try"
    assert config.job.seed == 42
    hyper = config.hyperparameters
    assert (hyper.n_epochs, hyper.max_steps, hyper.per_device_batch, hyper.gradient_accumulation_steps) == (
        1,
        None,
        1,
        1,
    )
    assert (hyper.learning_rate, hyper.warmup_ratio, hyper.lr_schedule) == (5e-5, 0.0, "linear")
    assert (hyper.weight_decay, hyper.max_grad_norm) == (0.0, 1.0)
    assert (hyper.adam_beta1, hyper.adam_beta2, hyper.adam_eps) == (0.9, 0.999, 1e-8)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32.0, 0.05)
    assert config.lora.targets == ALL_LINEAR
    assert (config.checkpoint.every_steps, config.checkpoint.keep, config.logging.every_steps) == (100, 3, 1)
    assert config.dtype == "bf16"
    assert config.world_size() is None
    assert not config.training.validation.enabled


def test_the_run_directory_of_settings_without_a_file_is_runs_run():
    assert RunConfig.from_dict({}).job.output_dir == "runs/run"


def test_a_given_run_directory_stays(write):
    assert load_config(write('[job]\noutput_dir = "elsewhere"')).job.output_dir == "elsewhere"
    assert load_config(write(""), ["job.output_dir=here"]).job.output_dir == "here"


def test_missing_training_data_is_refused_with_the_ways_to_set_it():
    message = refusal(RunConfig.from_dict({}).training_data)
    assert "--dataset" in message
    assert "[job]" in message
    assert RunConfig.from_dict({"job": {"data": "a.jsonl"}}).training_data() == (MixSettings(path="a.jsonl"),)


def test_max_steps_minus_one_means_no_limit_as_in_transformers():
    assert RunConfig.from_dict({"hyperparameters": {"max_steps": -1}}).hyperparameters.max_steps is None


@pytest.mark.parametrize(
    ("settings_", "enabled", "held_out"),
    [
        ({}, False, 0.0),
        ({"data": {"validation_path": "v.jsonl"}}, True, 0.0),
        ({"data": {"validation_fraction": 0.1}}, True, 0.1),
        ({"data": {"validation_path": "v.jsonl", "validation_fraction": 0.1}}, True, 0.0),
        ({"data": {"validation_fraction": 0.0}}, False, 0.0),
        ({"training": {"validation": {"enabled": True}}}, True, 0.02),
        ({"training": {"validation": {"eval_steps": 5}}}, False, 0.0),
        ({"training": {"validation": {"enabled": False}}, "data": {"validation_path": "v.jsonl"}}, False, 0.0),
        ({"training": {"validation": {"enabled": False}}, "data": {"validation_fraction": 0.1}}, False, 0.0),
    ],
)
def test_validation_is_on_where_it_is_asked_for_or_has_data_and_holds_out_only_without_a_file(
    settings_, enabled, held_out
):
    config = RunConfig.from_dict(settings_)
    assert config.training.validation.enabled is enabled
    assert config.data.validation_fraction == held_out


def test_validation_without_data_is_refused(write):
    text = "[data]\nvalidation_fraction = 0.0\n[training.validation]\nenabled = true"
    message = load_refusal(write, text)
    assert message.startswith("job.toml:2: [data] validation_fraction = 0.0: leaves nothing to validate on")


# The run files that people bring


def test_the_small_run_file_loads_as_it_is(write):
    config = load_config(write(SMALL_FILE), dataset="traces.jsonl")
    assert config.training.use_qlora
    assert config.training_data() == (MixSettings(path="traces.jsonl"),)
    assert config.world_size() == 4
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32.0, 0.05)
    assert config.lora.targets == ALL_LINEAR
    assert resolve_topology(config.data.topology, 4) == TopologySizes(2, 1, 2, 1, 1)


def test_the_large_run_file_loads_as_it_is(write):
    config = load_config(write(LARGE_FILE))
    assert config.training.use_qlora
    assert config.training_data() == (MixSettings(path="traces/crafter_sft_converted.jsonl"),)
    assert config.world_size() == 2
    assert resolve_topology(config.data.topology, 2) == TopologySizes(1, 1, 2, 1, 1)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32.0, 0.05)
    assert config.lora.targets == ALL_LINEAR
    assert config.hyperparameters.gradient_accumulation_steps == 64
    assert config.hyperparameters.learning_rate == 5e-6
    assert config.training.validation.enabled
    assert config.data.validation_fraction == 0.02
    assert config.dtype == "bf16"
    assert config.tags == {"experiment": "crafter_sft_lora_qwen_coder_30b"}


@pytest.mark.parametrize("name", ["qwen3_coder_30b", "demo"])
def test_the_shipped_files_ask_for_tp_2_x_dp_2_on_four_ranks(name):
    config = load_config(CONFIGS / f"{name}.toml")
    assert config.world_size() == 4
    assert resolve_topology(config.data.topology, 4) == TopologySizes(2, 1, 2, 1, 2)
    assert config.training.validation.enabled


def test_the_reference_file_writes_down_every_key_and_its_commented_keys_exist_too():
    text = (CONFIGS / "qwen3_coder_30b.toml").read_text()
    uncommented = "\n".join(line[2:] if line.startswith("# ") and " = " in line else line for line in text.split("\n"))
    written = tomllib.loads(uncommented)
    RunConfig.from_dict(written)  # refuses a key that does not exist

    synonyms = {"lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "train_kind"}
    for section, info in RunConfig.model_fields.items():
        if section != "tags":
            assert set(written[section]) >= set(info.annotation.model_fields) - synonyms, section
    assert set(written["data"]["topology"]) == set(TopologySettings.model_fields)
    for section, inner in (("training", "validation"), ("hyperparameters", "parallelism")):
        fields = RunConfig.model_fields[section].annotation.model_fields[inner].annotation.model_fields
        assert set(written[section][inner]) == set(fields)


def test_the_defaults_that_the_reference_file_names_are_the_defaults():
    text = (CONFIGS / "qwen3_coder_30b.toml").read_text()
    table_, stated = "", []
    for line in text.split("\n"):
        if line.startswith("["):
            table_ = line.partition("]")[0][1:]
        elif "  # default;" in line or line.endswith("# default"):
            stated.append(f"[{table_}]\n{line}\n")
    assert len(stated) > 20
    for setting in stated:
        config = RunConfig(**tomllib.loads(setting))
        assert resolve_topology(config.data.topology, 4) == resolve_topology(TopologySettings(), 4), setting
        if "[data.topology]" not in setting:
            assert config == RunConfig(), setting


def test_the_demo_runs_in_fp32():
    assert load_config(CONFIGS / "demo.toml").dtype == "fp32"


# Refusals: one value each, all in a file where the key stands on line 2


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("algorithm", "type", '"online"', "is not supported; set it to 'offline'"),
        ("algorithm", "method", '"dpo"', "is not supported; set it to 'sft'"),
        ("algorithm", "variety", '"full"', "is not supported; set it to 'lora'"),
        ("job", "model", "7", "must be a valid string"),
        ("job", "model", '""', "must have at least 1 character"),
        ("job", "data", "[]", "must be a valid string"),
        ("job", "output_dir", "false", "must be a valid string"),
        ("job", "seed", "-1", "must be greater than or equal to 0"),
        ("job", "seed", "4294967296", "must be less than 4294967296"),
        ("job", "init_adapter", "1", "must be a valid string"),
        ("compute", "gpu_type", "200", "must be a valid string"),
        ("compute", "gpu_count", "-1", "must be greater than or equal to 0"),
        ("compute", "nodes", "1.5", "must be a valid integer"),
        ("data", "validation_path", "true", "must be a valid string"),
        ("data", "validation_fraction", "0.6", "must be less than or equal to 0.5"),
        ("data", "template_args", "4", "must be a table"),
        ("data", "template_args", "{ day = 2026-01-31 }", "JSON has no form for"),
        ("data", "template_date", "4", "must be a date, such as 2026-01-31"),
        ("data", "template_date", '"31.1.2026"', "must be a date, such as 2026-01-31"),
        ("data", "lost_reasoning", '"ignore"', "must be 'refuse' or 'accept'"),
        ("data", "ignore_keys", "true", "must be a list of names"),
        ("data", "ignore_keys", "[3]", "must be a list of names"),
        ("data", "topology", "4", "must be a table"),
        ("data.topology", "tensor_parallel", "0", "must be greater than or equal to 1"),
        ("data.topology", "data_parallel", "-2", "must be greater than or equal to 1"),
        ("data.topology", "expert_parallel", '"2"', "must be a valid integer"),
        ("data.topology", "expert_tensor_parallel", "true", "must be a valid integer"),
        ("data.topology", "pipeline_parallel", "2.0", "must be a valid integer"),
        ("training", "mode", '"full"', "is not supported; set it to 'lora'"),
        ("training", "use_qlora", "1", "must be true or false"),
        ("quant", "type", '"fp4"', "is not supported; set it to 'nf4'"),
        ("quant", "double", '"yes"', "must be true or false"),
        ("quant", "block_size", "48", "must be one of 32, 64, 128"),
        ("quant", "experts_at_once", "0", "must be greater than or equal to 1"),
        ("quant", "cache_dir", '""', "must have at least 1 character"),
        ("quant", "bnb_4bit_use_double_quant", "true", "did you mean double?"),
        ("training.validation", "enabled", '"yes"', "must be true or false"),
        ("training.validation", "evaluation_strategy", '"never"', "must be 'steps', 'epoch' or 'no'"),
        ("training.validation", "eval_steps", "0", "must be greater than or equal to 1"),
        ("training.validation", "save_best_model_at_end", "0", "must be true or false"),
        (
            "training.validation",
            "metric_for_best_model",
            '"accuracy"',
            "megasft measures val.loss, val.perplexity, val.token_accuracy, and with `generate` val.exact_match, ",
        ),
        ("training.validation", "generate", "-1", "must be"),
        ("training.validation", "greater_is_better", "true", "a loss is better when it is smaller"),
        ("lora", "r", "0", "must be greater than or equal to 1"),
        ("lora", "r", "16.0", "must be a valid integer"),
        ("lora", "alpha", "0", "must be greater than 0"),
        ("lora", "alpha", "inf", "must be a finite number"),
        ("lora", "dropout", "1.0", "must be less than 1"),
        ("lora", "dropout", "-0.1", "must be greater than or equal to 0"),
        ("lora", "target_modules", '["q_prj"]', "'q_prj' is not a layer that takes LoRA; did you mean 'q_proj'?"),
        (
            "lora",
            "target_modules",
            '["lm_head"]',
            "'lm_head' is not a layer that takes LoRA; known: all-linear, q_proj",
        ),
        ("lora", "target_modules", "[]", "names no layer"),
        ("lora", "target_modules", "[1]", 'must be a list of names, such as ["all-linear"]'),
        ("hyperparameters", "n_epochs", "0", "must be greater than or equal to 1"),
        ("hyperparameters", "max_steps", "0", "must be greater than or equal to 1"),
        ("hyperparameters", "max_steps", "-2", "must be greater than or equal to 1"),
        ("hyperparameters", "per_device_batch", "true", "must be a valid integer"),
        ("hyperparameters", "gradient_accumulation_steps", "0", "must be greater than or equal to 1"),
        ("hyperparameters", "sequence_length", '"4096"', "must be a valid integer"),
        ("hyperparameters", "learning_rate", '"5e-6"', "must be a valid number"),
        ("hyperparameters", "learning_rate", "true", "must be a valid number"),
        ("hyperparameters", "learning_rate", "nan", "must be a finite number"),
        ("hyperparameters", "learning_rate", "0", "must be greater than 0"),
        ("hyperparameters", "warmup_ratio", "3", "must be less than or equal to 1"),
        ("hyperparameters", "lr_schedule", '"wsd"', "must be 'linear', 'cosine' or 'constant'"),
        ("hyperparameters", "weight_decay", "-0.1", "must be greater than or equal to 0"),
        ("hyperparameters", "max_grad_norm", "-1.0", "must be greater than or equal to 0"),
        ("hyperparameters", "adam_beta1", "1.0", "must be less than 1"),
        ("hyperparameters", "adam_beta2", "1", "must be less than 1"),
        ("hyperparameters", "adam_eps", "0.0", "must be greater than 0"),
        ("hyperparameters", "router_aux_loss_coef", "-0.1", "must be greater than or equal to 0"),
        ("hyperparameters.parallelism", "token_dispatcher", '"flex"', "must be 'auto', 'alltoall' or 'allgather'"),
        ("logging", "experts_every_steps", "0", "must be greater than or equal to 1"),
        ("logging", "answers", "65", "must be less than or equal to 64"),
        ("hyperparameters", "lora_rank", "0", "must be greater than or equal to 1"),
        ("hyperparameters", "lora_alpha", '"32"', "must be a valid number"),
        ("hyperparameters", "lora_dropout", "1.0", "must be less than 1"),
        ("hyperparameters", "lora_target_modules", '["qproj"]', "did you mean 'q_proj'?"),
        ("hyperparameters", "train_kind", '"full"', "must be 'peft' or 'lora'"),
        ("hyperparameters.parallelism", "use_deepspeed", "2", "must be true or false"),
        ("hyperparameters.parallelism", "deepspeed_stage", "0", "keeps complete optimizer states on every rank"),
        ("hyperparameters.parallelism", "deepspeed_stage", "3", "megasft shards them by [data.topology]"),
        ("hyperparameters.parallelism", "deepspeed_stage", "4", "there is no such stage"),
        ("hyperparameters.parallelism", "deepspeed_stage", "true", "must be a valid integer"),
        ("hyperparameters.parallelism", "fsdp", "true", "not by FSDP"),
        ("hyperparameters.parallelism", "bf16", '"true"', "must be true or false"),
        ("hyperparameters.parallelism", "fp16", "true", "bf16 or fp32"),
        ("hyperparameters.parallelism", "activation_checkpointing", "1", "must be true or false"),
        ("checkpoint", "every_steps", "0", "must be greater than or equal to 1"),
        ("checkpoint", "keep", "0", "must be greater than or equal to 1"),
        ("logging", "every_steps", "0", "must be greater than or equal to 1"),
        ("tags", "nested", "{a = 1}", "a tag must be"),
        ("tags", "score", "nan", "a tag must be"),
        ("tags", "score", "-inf", "a tag must be"),
    ],
)
def test_a_bad_value_is_refused_with_file_line_section_key_and_reason(write, section, key, value, reason):
    message = load_refusal(write, table(section, key, value))
    assert message.startswith("job.toml:2: [")
    assert f"{section}] {key} = " in message or f"[{section}.{key}]" in message
    assert reason in message


def validating(metric: str, more: str = "generate = 8") -> str:
    return f'[data]\nvalidation_path = "v.jsonl"\n[training.validation]\nmetric_for_best_model = "{metric}"\n{more}\n'


def test_a_score_decides_only_where_answers_are_asked_for(write):
    message = load_refusal(write, validating("val.call_match", ""))
    assert message.startswith(
        'job.toml:4: [training.validation] metric_for_best_model = "val.call_match": needs answers'
    )
    assert message.endswith("generate = 32, or name one of val.loss, val.perplexity, val.token_accuracy")
    message = load_refusal(write, "[training.validation]\nenabled = false\ngenerate = 8\n")
    assert message.startswith("job.toml:3: [training.validation] generate = 8: there is no validation")


@pytest.mark.parametrize(
    ("metric", "more", "greater"),
    [("val.loss", "", False), ("val.perplexity", "", False), ("val.token_accuracy", "", True), ("val.call_match", "", True),
     ("val.unasked_call", "", False), ("val.cut_off", "", False), ("val.cut_off", "greater_is_better = true", True),
     ("val.exact_match", "greater_is_better = false", False)],
)  # fmt: skip
def test_greater_is_better_is_what_it_says_or_what_the_metric_means(write, metric, more, greater):
    validation = load_config(write(validating(metric, f"generate = 8\n{more}"))).training.validation
    assert validation.greater_is_better is greater
    assert (validation.is_better(0.5, 0.25), validation.is_better(0.25, 0.5)) == (greater, not greater)
    assert validation.is_better(0.5, None)
    assert not validation.is_better(None, None)


@pytest.mark.parametrize("metric", ["val.loss", "val.perplexity"])
def test_a_loss_is_never_better_when_it_is_greater(write, metric):
    message = load_refusal(write, validating(metric, "greater_is_better = true"))
    assert message.startswith("job.toml:5: [training.validation] greater_is_better = true: a ")


def test_the_value_is_shown_as_it_was_written(write):
    message = load_refusal(write, '[algorithm]\nmethod = "dpo"')
    assert message == "job.toml:2: [algorithm] method = \"dpo\": is not supported; set it to 'sft'"


@pytest.mark.parametrize(
    ("section", "key", "value", "stored"),
    [
        ("training.validation", "metric_for_best_model", '"eval_loss"', "val.loss"),
        ("training.validation", "metric_for_best_model", '"val_loss"', "val.loss"),
        ("training.validation", "metric_for_best_model", '"loss"', "val.loss"),
        ("training.validation", "metric_for_best_model", '"eval_token_accuracy"', "val.token_accuracy"),
        ("training.validation", "evaluation_strategy", '"epoch"', "epoch"),
        ("lora", "alpha", "8", 8.0),
        ("lora", "target_modules", '"q_proj"', ("q_proj",)),
        ("lora", "target_modules", '["v_proj", "q_proj", "v_proj"]', ("q_proj", "v_proj")),
        ("lora", "target_modules", '["all-linear", "q_proj"]', ("all-linear",)),
        ("lora", "target_modules", '["gate", "all-linear"]', ("all-linear", "gate")),
        ("lora", "target_modules", '"all-linear,gate"', ("all-linear", "gate")),
        ("hyperparameters", "max_grad_norm", "0", 0.0),
        ("hyperparameters", "lr_schedule", '"cosine"', "cosine"),
        ("hyperparameters.parallelism", "deepspeed_stage", "1", 1),
        ("tags", "day", "2026-01-31", "2026-01-31"),
        ("tags", "final", "true", True),
    ],
)
def test_a_valid_value_is_stored_in_its_canonical_form(write, section, key, value, stored):
    config = load_config(write(table(section, key, value))).model_dump()
    for name in (*section.split("."), key):
        config = config[name]
    assert config == stored


def test_all_linear_has_no_router_and_gate_beside_it_adds_one():
    assert RunConfig.from_dict({"lora": {"target_modules": ["all-linear"]}}).lora.targets == ALL_LINEAR
    assert RunConfig.from_dict({"lora": {"target_modules": ["all-linear", "gate"]}}).lora.targets == EVERY_LAYER


@pytest.mark.parametrize(
    ("layers", "short"),
    [
        (ALL_LINEAR, ("all-linear",)),
        (EVERY_LAYER, ("all-linear", "gate")),
        ({"v_proj", "gate"}, ("gate", "v_proj")),
        ((), ()),
    ],
)
def test_layers_are_named_as_short_as_the_run_file_takes_them(layers, short):
    assert short_targets(layers) == short
    if layers:
        assert RunConfig.from_dict({"lora": {"target_modules": short}}).lora.targets == set(layers)


def test_the_router_and_the_gate_projection_are_different_targets():
    assert RunConfig.from_dict({"lora": {"target_modules": ["gate"]}}).lora.targets == {"gate"}
    assert RunConfig.from_dict({"lora": {"target_modules": ["gate_proj"]}}).lora.targets == {"gate_proj"}


def test_without_bf16_the_run_is_fp32():
    assert RunConfig.from_dict({"hyperparameters": {"parallelism": {"bf16": False}}}).dtype == "fp32"


# Refusals: keys


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("hyperparameters", "learning_rat", "learning_rate"),
        ("hyperparameters", "LR", "learning_rate"),
        ("hyperparameters", "num_train_epochs", "n_epochs"),
        ("hyperparameters", "per_device_train_batch_size", "per_device_batch"),
        ("hyperparameters", "max_seq_length", "sequence_length"),
        ("hyperparameters", "lr", "learning_rate"),
        ("hyperparameters", "lr_scheduler_type", "lr_schedule"),
        ("hyperparameters", "gradient_checkpointing", "[hyperparameters.parallelism] activation_checkpointing"),
        ("hyperparameters", "save_steps", "[checkpoint] every_steps"),
        ("hyperparameters", "logging_steps", "[logging] every_steps"),
        ("hyperparameters", "bf16", "[hyperparameters.parallelism] bf16"),
        ("hyperparameters", "seed", "[job] seed"),
        ("hyperparameters", "moe_aux_loss_coeff", "router_aux_loss_coef"),
        ("hyperparameters", "moe_token_dispatcher_type", "[hyperparameters.parallelism] token_dispatcher"),
        ("lora", "rank", "r"),
        ("lora", "lora_alpha", "alpha"),
        ("lora", "target_module", "target_modules"),
        ("training", "learning_rate", "[hyperparameters] learning_rate"),
        ("training", "eval_stratgy", "[training.validation] evaluation_strategy"),
        ("data", "tensor_parallel", "[data.topology] tensor_parallel"),
        ("data.topology", "tensor_model_parallel_size", "tensor_parallel"),
        ("data.topology", "tensor_paralel", "tensor_parallel"),
        ("job", "model_name_or_path", "model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(write, section, key, meant):
    message = load_refusal(write, table(section, key, "1"))
    assert message == f"job.toml:2: [{section}] {key} = 1: unknown key; did you mean {meant}?"


@pytest.mark.parametrize(
    ("section", "key", "instead"),
    [
        ("lora", "use_rslora", "the update is alpha / r * B A: for rsLoRA's scaling set [lora] alpha"),
        ("data", "num_proc", "tokenizing and loading use all available cores"),
        ("hyperparameters", "optim", "the optimizer is AdamW"),
    ],
)
def test_a_setting_that_only_other_trainers_have_is_told_what_happens_instead(write, section, key, instead):
    message = load_refusal(write, table(section, key, "1"))
    assert message.startswith(f"job.toml:2: [{section}] {key} = 1: megasft has no such setting; {instead}")
    assert "did you mean" not in message


def test_no_setting_of_another_trainer_is_both_known_and_absent():
    keys = {key[-1] for key in _known_keys(RunConfig)} | {
        name for names in FOREIGN_NAMES.values() for name in names.split()
    }
    assert ABSENT.keys()
    assert not ABSENT.keys() & keys
    assert set(FOREIGN_NAMES) <= set(_known_keys(RunConfig)) | {("data", "mix")}


@pytest.mark.parametrize("name", ["keep_last", "xyzzy", "use_nothing", "batch"])
def test_a_name_that_is_close_to_none_is_not_guessed(write, name):
    message = load_refusal(write, table("checkpoint", name, "1"))
    assert f"[checkpoint] {name} = 1: unknown key; known here: every_steps, " in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[hyperparameter]\nn_epochs = 2", "job.toml:1: [hyperparameter]: unknown key; did you mean hyperparameters?"),
        ("n_epochs = 2", "job.toml:1: n_epochs = 2: unknown key; did you mean [hyperparameters] n_epochs?"),
        (
            "[logging]\nxyzzy = 2",
            "job.toml:2: [logging] xyzzy = 2: unknown key; known here: every_steps, to, project, run_name, experts_every_steps, answers",
        ),
        (
            '[logging]\n"odd key" = 2',
            'job.toml:2: [logging] "odd key" = 2: unknown key; known here: every_steps, to, project, run_name, experts_every_steps, answers',
        ),
        ("lora = 3", "job.toml:1: lora = 3: must be a table"),
        ("[[lora]]\nr = 3", 'job.toml:1: lora = [{"r": 3}]: must be a table'),
    ],
)
def test_a_key_outside_a_section_is_refused_too(write, text, expected):
    assert load_refusal(write, text) == expected


def test_of_several_mistakes_the_first_is_explained_and_the_others_are_named(write):
    message = load_refusal(write, "[lora]\nr = 0\nrank = 8\n[hyperparameters]\nn_epochs = 0\n")
    assert message.startswith("job.toml:2: [lora] r = 0: must be greater than or equal to 1")
    assert message.endswith("(and 2 more: lora.rank, hyperparameters.n_epochs)")


# Refusals: files


def test_each_kind_of_unreadable_file_is_one_line(write, tmp_path):
    assert refusal(load_config, "absent.toml").startswith("absent.toml: no such file")
    assert refusal(load_config, tmp_path).startswith(f"{tmp_path}: is not a file")
    assert refusal(load_config, write(b"[job]\nmodel = '\xff'")).startswith("job.toml:2: not UTF-8 text")
    assert "1048577 bytes is no run file" in refusal(load_config, write("#" * (2**20 + 1)))
    assert refusal(load_config, "x" * 5000).endswith("File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(write):
    Path(write("")).chmod(0)
    assert refusal(load_config, "job.toml") == "job.toml: cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[job]\nseed = 1\nmodel = Qwen\n", ":3"),
        ("[job\nseed = 1\n", ":1"),
        ("[job]\nseed = 1\nseed = 2\n", ":3"),
        ("[job]\nmodel = '''", ""),  # tomllib says "at end of document"
        ("[job]\nseed = " + "[" * 5000, ""),
        ("[job]\nseed = " + "1" * 5000, ""),
    ],
)
def test_toml_that_does_not_parse_is_refused_with_its_line(write, text, line):
    assert load_refusal(write, text).startswith(f"job.toml{line}: not valid TOML: ")


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(write):
    assert load_config(write("\ufeff[job]\r\nseed = 7\r\n")).job.seed == 7
    assert load_refusal(write, "\ufeff[job]\r\nseed = -7\r\n").startswith("job.toml:2: ")


def test_line_numbers_hold_around_long_values_comments_and_every_way_to_write_a_key():
    text = '''\
# [lora]
a = """
r = 0
[lora]
"""

[lora]  # r = 1
target_modules = [
    "q_proj",  # ]

    "v_proj",
]
r = 3
"alpha" = 4
[ data . topology ]
tensor_parallel = 1
[hyperparameters]
parallelism.bf16 = true
parallelism.fp16 = false
[training]
validation = { enabled = true, eval_steps = 3 }
[data]
validation_path = "v"
[lora.more]
'''
    lines = key_lines(text)
    assert lines[("a",)] == 2
    assert lines[("lora",)] == 7
    assert lines[("lora", "target_modules")] == 8
    assert lines[("lora", "r")] == 13
    assert lines[("lora", "alpha")] == 14
    assert lines[("data", "topology", "tensor_parallel")] == 16
    assert lines[("hyperparameters", "parallelism", "bf16")] == 18
    assert lines[("hyperparameters", "parallelism", "fp16")] == 19
    assert lines[("training", "validation", "eval_steps")] == 21
    assert lines[("data", "validation_path")] == 23


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("lora.r=8", "lora", "r", 8),
        (" lora.r = 8 ", "lora", "r", 8),
        ("hyperparameters.learning_rate=1e-4", "hyperparameters", "learning_rate", 1e-4),
        ("job.model=/models/qwen = 3", "job", "model", "/models/qwen = 3"),
        ('job.model="quoted"', "job", "model", "quoted"),
        ("job.model=2\nwords = 3", "job", "model", "2\nwords = 3"),
        ('lora.target_modules=["q_proj", "gate"]', "lora", "target_modules", ("q_proj", "gate")),
        ("lora.target_modules=q_proj,gate", "lora", "target_modules", ("q_proj", "gate")),
        ("data.topology={tensor_parallel = 2}", "data", "topology", TopologySettings(tensor_parallel=2)),
        ("data.topology.expert_parallel=4", "data", "topology", TopologySettings(expert_parallel=4)),
        ("tags.note=a # b", "tags", "note", "a # b"),
        ("tags.note=", "tags", "note", ""),
    ],
)
def test_an_override_is_toml_and_otherwise_a_string(write, override, section, key, value):
    found = getattr(load_config(write(""), [override]), section)
    assert (found[key] if section == "tags" else getattr(found, key)) == value


def test_overrides_win_over_the_file_and_the_later_over_the_earlier(write):
    name = write("[lora]\nr = 4\nalpha = 8\n")
    config = load_config(name, ["lora.r=5", "lora.r=6"])
    assert (config.lora.r, config.lora.alpha) == (6, 8.0)


def test_the_dataset_argument_wins_over_file_and_override(write):
    name = write('[job]\ndata = "file.jsonl"\n')
    assert load_config(name).job.data == "file.jsonl"
    assert load_config(name, ["job.data=set.jsonl"]).job.data == "set.jsonl"
    assert load_config(name, ["job.data=set.jsonl"], dataset=Path("given.jsonl")).job.data == "given.jsonl"


@pytest.mark.parametrize("override", ["lora.r", "=3", ".r=3", "lora..r=3", "lora.=3"])
def test_an_override_without_key_or_value_is_refused_with_an_example(write, override):
    message = load_refusal(write, "", [override])
    assert message == f"--set {override}: must be section.key=value, as in lora.r=8"


def test_a_list_that_is_not_toml_is_refused_and_not_taken_for_a_string(write):
    message = load_refusal(write, "", ["lora.target_modules=[q_proj, v_proj]"])
    assert message.startswith("--set lora.target_modules=[q_proj, v_proj]: the value is not valid TOML")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("hyperparameters.learning_rat=5e-6", ": unknown key; did you mean learning_rate?"),
        ("hyperparameter.n_epochs=5", ": [hyperparameter]: unknown key; did you mean hyperparameters?"),
        ("seed=5", ": unknown key; did you mean [job] seed?"),
        ("lora.r=8 \n9", ": must be a valid integer"),
        ("lora.r=eight", ": must be a valid integer"),
        ("lora.r.s=8", ": [lora.r]: must be a valid integer"),
        ("lora={r = 0}", ": [lora] r = 0: must be greater than or equal to 1"),
    ],
)
def test_a_mistake_in_an_override_is_shown_where_it_was_made(write, override, expected):
    assert load_refusal(write, "[lora]\nr = 4\n", [override]) == f"--set {override}{expected}".replace("\n", "")


def test_an_error_names_the_last_of_several_overrides(write):
    overrides = ["lora.r=0", "lora={r = 4}", "lora.r=0 # again"]
    assert load_refusal(write, "", overrides).startswith("--set lora.r=0 # again: must be")


def test_an_empty_dataset_argument_is_refused_as_such(write):
    assert load_refusal(write, "", dataset="") == "--dataset: must have at least 1 character"


# Two keys for one setting


@pytest.mark.parametrize(
    ("synonym", "key", "value", "other"),
    [
        ("lora_rank", "r", "4", "8"),
        ("lora_alpha", "alpha", "4.5", "8"),
        ("lora_dropout", "dropout", "0.3", "0.0"),
        ("lora_target_modules", "target_modules", '["q_proj"]', '["q_proj", "v_proj"]'),
    ],
)
def test_a_synonym_means_the_lora_key_and_may_repeat_but_not_contradict_it(write, synonym, key, value, other):
    alone = load_config(write(table("hyperparameters", synonym, value)))
    plain = load_config(write(table("lora", key, value)))
    both = load_config(write(table("lora", key, value) + table("hyperparameters", synonym, value)))
    assert alone == plain == both
    assert synonym not in alone.to_toml()

    message = load_refusal(write, table("lora", key, other) + table("hyperparameters", synonym, value))
    assert message == (
        f"job.toml:4: [hyperparameters] {synonym} = {value}: contradicts job.toml:2: [lora] {key} = {other}; "
        "keep one of the two"
    )


def test_a_synonym_contradicts_a_lora_key_that_repeats_the_default(write):
    message = load_refusal(write, "[lora]\nr = 16\n[hyperparameters]\nlora_rank = 8\n")
    assert "contradicts" in message


def test_equal_targets_in_another_order_are_no_contradiction(write):
    text = (
        '[lora]\ntarget_modules = ["v_proj", "q_proj"]\n[hyperparameters]\nlora_target_modules = ["q_proj", "v_proj"]'
    )
    assert load_config(write(text)).lora.targets == {"q_proj", "v_proj"}


@pytest.mark.parametrize("override", ["lora.r=8", "lora={r = 8}", "hyperparameters.lora_rank=8"])
@pytest.mark.parametrize("text", ["[lora]\nr = 4", "[hyperparameters]\nlora_rank = 4"])
def test_an_override_of_either_name_replaces_the_setting_under_both(write, text, override):
    assert load_config(write(text), [override]).lora.r == 8


# Topology


@pytest.mark.parametrize(
    ("asked", "world", "sizes"),
    [
        ({}, 1, TopologySizes(tensor=1, pipeline=1, data=1, expert=1, expert_tensor=1)),
        ({}, 6, TopologySizes(tensor=1, pipeline=1, data=6, expert=1, expert_tensor=1)),
        ({"tensor_parallel": 2}, 4, TopologySizes(2, 1, 2, 1, 1)),
        ({"tensor_parallel": 4}, 4, TopologySizes(4, 1, 1, 1, 1)),
        ({"tensor_parallel": 2, "data_parallel": 2}, 4, TopologySizes(2, 1, 2, 1, 1)),
        ({"tensor_parallel": 2, "expert_parallel": 2}, 4, TopologySizes(2, 1, 2, 2, 1)),
        ({"tensor_parallel": 2, "expert_parallel": 4}, 4, TopologySizes(2, 1, 2, 4, 1)),
        ({"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}, 4, TopologySizes(2, 1, 2, 2, 2)),
        ({"tensor_parallel": 4, "expert_tensor_parallel": 2}, 4, TopologySizes(4, 1, 1, 1, 2)),
        ({"tensor_parallel": 1, "expert_tensor_parallel": 4}, 4, TopologySizes(1, 1, 4, 1, 4)),
        ({"expert_parallel": 4}, 4, TopologySizes(1, 1, 4, 4, 1)),
        ({"pipeline_parallel": 2}, 4, TopologySizes(1, 2, 2, 1, 1)),
        ({"pipeline_parallel": 2, "tensor_parallel": 2, "expert_parallel": 2}, 8, TopologySizes(2, 2, 2, 2, 1)),
        ({"pipeline_parallel": 3, "tensor_parallel": 2}, 6, TopologySizes(2, 3, 1, 1, 1)),
        ({"data_parallel": 3}, 3, TopologySizes(1, 1, 3, 1, 1)),
    ],
)
def test_what_a_topology_leaves_out_is_derived(asked, world, sizes):
    assert resolve_topology(TopologySettings(**asked), world) == sizes


@pytest.mark.parametrize(
    ("asked", "world", "asks_for"),
    [
        ({"tensor_parallel": 2}, 3, "a multiple of 2 (tensor_parallel 2 x pipeline_parallel 1)"),
        ({"tensor_parallel": 8}, 4, "a multiple of 8 (tensor_parallel 8 x pipeline_parallel 1)"),
        ({"tensor_parallel": 2, "pipeline_parallel": 4}, 4, "a multiple of 8 ("),
        (
            {"tensor_parallel": 2, "data_parallel": 2},
            2,
            "4 (tensor_parallel 2 x pipeline_parallel 1 x data_parallel 2)",
        ),
        ({"tensor_parallel": 2, "data_parallel": 2}, 8, "4 ("),
        ({"data_parallel": 2}, 4, "2 ("),
        ({"expert_parallel": 3}, 4, "a multiple of 3 (expert_tensor_parallel 1 x expert_parallel 3 x pipeline_"),
        ({"expert_parallel": 4, "expert_tensor_parallel": 2}, 4, "a multiple of 8 (expert_tensor_parallel 2 x expert_"),
        ({"expert_parallel": 2, "pipeline_parallel": 4}, 4, "a multiple of 8 (expert_tensor_parallel 1 x expert_"),
        ({"tensor_parallel": 4, "pipeline_parallel": 4, "expert_parallel": 64, "expert_tensor_parallel": 8}, 360, "a"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused_with_topologies_that_do(asked, world, asks_for):
    message = refusal(resolve_topology, TopologySettings(**asked), world)
    assert message.startswith(f"launched {world} ranks, but [data.topology] asks for {asks_for}")
    offered = message.partition("; set [data] ")[2].partition(", or run")[0].split(" or ")
    assert 1 <= len(offered) <= 3
    assert len(set(offered)) == len(offered)
    for fragment in offered:
        topology = RunConfig.from_dict({"data": tomllib.loads(fragment)}).data.topology
        resolve_topology(topology, world)
        assert set(asked) <= topology.model_fields_set


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        ({"expert_parallel": 2}, "expert_parallel 2 x expert_tensor_parallel 1 does not divide tensor_parallel 1"),
        (
            {"expert_tensor_parallel": 2},
            "expert_parallel 1 x expert_tensor_parallel 2 does not divide tensor_parallel 1",
        ),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, "needs pipeline_parallel = 1, not 2"),
    ],
)
def test_a_dispatcher_that_the_topology_does_not_support_is_refused(topology, reason):
    def settings(dispatcher):
        return {
            "data": {"topology": topology},
            "hyperparameters": {"parallelism": {"token_dispatcher": dispatcher}},
        }

    message = refusal(RunConfig.from_dict, settings("allgather"))
    assert message.startswith('[hyperparameters.parallelism] token_dispatcher = "allgather": needs')
    assert reason in message
    assert '"alltoall" works with any topology' in message
    for dispatcher in ("auto", "alltoall"):
        RunConfig.from_dict(settings(dispatcher))


def test_of_the_topologies_that_fit_the_nearest_come_first():
    asked = TopologySettings(tensor_parallel=4, data_parallel=4)
    message = refusal(resolve_topology, asked, 8)
    assert (
        "set [data] topology = {tensor_parallel = 2, data_parallel = 4}"
        " or topology = {tensor_parallel = 4, data_parallel = 2}" in message
    )


def test_an_error_for_too_few_ranks_names_the_number_to_launch():
    message = refusal(resolve_topology, TopologySettings(tensor_parallel=2, data_parallel=2), 1)
    assert message.startswith("launched 1 rank, but")
    assert message.endswith(", or run `torchrun --nproc-per-node 4`")


@pytest.mark.parametrize(
    ("settings_", "world"),
    [
        ({"compute": {"gpu_count": 4}}, 4),
        ({"compute": {"gpu_count": 8, "nodes": 2}}, 16),
        ({"compute": {"nodes": 2}}, None),
        ({"data": {"topology": {"tensor_parallel": 2}}}, None),
        ({"data": {"topology": {"data_parallel": 2}}}, 2),
        ({"data": {"topology": {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2}}}, 8),
        ({"compute": {"gpu_count": 4}, "data": {"topology": {"tensor_parallel": 2}}}, 4),
    ],
)
def test_the_world_that_a_file_asks_for_is_its_topology_or_else_its_gpus(settings_, world):
    assert RunConfig.from_dict(settings_).world_size() == world


def test_gpus_that_contradict_the_topology_are_refused_on_loading(write):
    topology = "[data.topology]\ntensor_parallel = 2\ndata_parallel = 2\n"
    message = load_refusal(write, "[compute]\ngpu_count = 2\n" + topology)
    assert message.startswith("job.toml:2: [compute] gpu_count = 2: makes 2 ranks, but [data.topology] asks for 4 (")
    assert "topology = {tensor_parallel = 1, data_parallel = 2}" in message
    message = load_refusal(write, "[compute]\ngpu_count = 2\nnodes = 4\n" + topology)
    assert "makes 8 ranks on 4 nodes, but [data.topology] asks for 4 (" in message
    load_config(write("[compute]\ngpu_count = 2\nnodes = 2\n" + topology))


def test_a_full_topology_whose_experts_do_not_fit_is_refused_on_loading(write):
    message = load_refusal(write, "[data.topology]\ndata_parallel = 4\nexpert_parallel = 3\n")
    assert message.startswith(
        "job.toml:1: [data.topology]: makes 4 ranks, but [data.topology] asks for a multiple of 3"
    )


def test_gpus_too_many_to_exist_are_refused_at_once():
    settings_ = {"compute": {"gpu_count": 32749, "nodes": 32749}, "data": {"topology": {"tensor_parallel": 2}}}
    assert "asks for a multiple of 2" in refusal(RunConfig.from_dict, settings_)
    assert "must be less than 32768" in refusal(RunConfig.from_dict, {"compute": {"gpu_count": 10**18}})


# In and out of Python


def test_a_dict_gets_the_same_refusals_without_a_place():
    message = refusal(RunConfig.from_dict, {"hyperparameters": {"learning_rat": 0.5}})
    assert message == "[hyperparameters] learning_rat = 0.5: unknown key; did you mean learning_rate?"
    assert refusal(RunConfig.from_dict, []) == "the settings: must be a table"
    assert "must be a valid string" in refusal(RunConfig.from_dict, {"job": {"data": object()}})


def test_a_dict_may_hold_paths_and_is_not_modified():
    settings_ = {"job": {"data": Path("a/b.jsonl")}, "hyperparameters": {"lora_rank": 4}}
    config = RunConfig.from_dict(settings_)
    assert config.job.data == "a/b.jsonl"
    assert config.lora.r == 4
    assert settings_ == {"job": {"data": Path("a/b.jsonl")}, "hyperparameters": {"lora_rank": 4}}


def test_settings_do_not_change_once_made():
    config = RunConfig.from_dict({})
    with pytest.raises(ValueError, match="frozen"):
        config.lora.r = 8


numbers = st.floats(min_value=1e-9, max_value=1e9)
texts = st.text(st.characters(codec="utf-8"), min_size=1)
written_settings = st.fixed_dictionaries(
    {},
    optional={
        "job": st.fixed_dictionaries({}, optional={"data": texts, "output_dir": texts, "model": texts}),
        "data": st.fixed_dictionaries(
            {}, optional={"validation_path": texts, "validation_fraction": st.floats(0.01, 0.5)}
        ),
        "training": st.fixed_dictionaries({"validation": st.fixed_dictionaries({"enabled": st.booleans()})}),
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "r": st.integers(1, 512),
                "alpha": numbers,
                "target_modules": st.lists(st.sampled_from(["all-linear", *sorted(EVERY_LAYER)]), min_size=1),
            },
        ),
        "hyperparameters": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": numbers,
                "max_steps": st.integers(1, 10**6) | st.just(-1),
                "lora_dropout": st.floats(0, 0.99),
                "parallelism": st.fixed_dictionaries({"bf16": st.booleans(), "deepspeed_stage": st.integers(1, 2)}),
            },
        ),
        "tags": st.dictionaries(texts, texts | st.booleans() | st.integers(-(2**63), 2**63 - 1) | numbers),
    },
)


@settings(max_examples=50, deadline=None)
@given(written_settings)
def test_resolved_settings_written_as_toml_load_as_equal_settings(tmp_path_factory, written):
    config = RunConfig.from_dict(written)
    path = tmp_path_factory.mktemp("run") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("text", [SMALL_FILE, LARGE_FILE])
def test_the_run_files_survive_a_round_trip(write, text):
    config = load_config(write(text))
    assert load_config(write(config.to_toml(), "config.toml")) == config
