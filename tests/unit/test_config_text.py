"""The text of a run file, and overrides from the command line: mistakes are shown where they were made."""

import os
from pathlib import Path

import pytest

from megasft.config.parallelism import TopologySettings
from megasft.config.schema import load_config
from megasft.config.toml import key_lines
from tests.unit.run_files import load_refusal, refusal

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
