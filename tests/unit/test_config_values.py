"""Values of a run file: what is refused and why, and how a valid one is stored."""

import pytest

from megasft.config.schema import RunConfig, load_config
from megasft.config.values import short_targets
from tests.unit.run_files import ALL_LINEAR, EVERY_LAYER, load_refusal, table

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
        ("hyperparameters.parallelism", "activation_checkpointing", "1", 'must be true, false or "selective"'),
        ("hyperparameters.parallelism", "activation_checkpointing", '"full"', 'must be true, false or "selective"'),
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
