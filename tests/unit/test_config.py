"""Defaults of a run file, the files that people bring and those of configs/, dicts, and settings written as TOML."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.config.parallelism import TopologySettings, TopologySizes, resolve_topology
from megasft.config.schema import MixSettings, RunConfig, load_config
from tests.unit.run_files import ALL_LINEAR, EVERY_LAYER, load_refusal, refusal

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
