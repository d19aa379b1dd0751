"""Keys of a run file: unknown ones, those of other trainers, and two names for one setting."""

import pytest

from megasft.config.aliases import ABSENT, FOREIGN_NAMES
from megasft.config.schema import RunConfig, load_config
from megasft.config.toml import _known_keys
from tests.unit.run_files import load_refusal, table

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
