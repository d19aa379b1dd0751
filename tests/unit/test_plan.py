"""What `megasft plan` says from a run file and a config.json alone."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megasft import cli
from megasft.config.schema import RunConfig, load_config
from megasft.config.toml import parse_override
from megasft.messages import UserError
from megasft.model.shape import RELEASED, PlainShape, read_shape, weights
from megasft.plan import parameters, remedies
from megasft.plan.advice import advice
from megasft.plan.devices import find_gpu
from megasft.plan.job import Job
from megasft.plan.memory import memory
from megasft.plan.plan import Dataset, find_shape, make_plan, read_dataset
from megasft.plan.report import one_line
from megasft.plan.search import reasons, search
from megasft.plan.state import adapters, elements
from tests.parity.reference import tiny_config

REFERENCE = "configs/qwen3_coder_30b.toml"
H200 = find_gpu("H200")
TOPOLOGY = {"tensor_parallel": 2, "expert_tensor_parallel": 2}
GiB = 2**30


def plan_of(ranks=4, gpu=H200, shape=RELEASED["Qwen3-Coder-30B-A3B"], dataset=None, imbalance=1.5, **sections):
    return make_plan(RunConfig.from_dict(sections), shape, ranks, gpu, 8, dataset, imbalance)


def test_it_needs_no_weights_no_torch_and_no_ranks(tmp_path):
    code = (
        "import sys; sys.argv[1:] = ['plan', '--config', 'configs/qwen3_coder_30b.toml', '--json']\n"
        "from megasft import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    found = json.loads(done.stdout)
    assert found["memory"]["state"]["frozen weights"] == pytest.approx(28.45 * GiB, rel=1e-3)
    assert found["topology"]["tensor"] == found["topology"]["expert_tensor"] == 2


def test_the_table_the_picture_and_json_say_the_same(capsys, monkeypatch, tmp_path):
    picture = tmp_path / "memory.svg"

    def said(*more):
        monkeypatch.setattr(sys, "argv", ["megasft", "plan", "--config", REFERENCE, *map(str, more)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    text, found = said("--plot", picture), json.loads(said("--json"))
    peak = found["memory"]["peak"] / GiB
    assert re.search(rf"^  peak +{peak:.3f}$", text, re.MULTILINE)
    assert f"{found['step']['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU" in text
    assert "estimated by roofline, not measured" in text
    titles = [node.text for node in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}title")]
    assert f"frozen weights: {found['memory']['state']['frozen weights'] / GiB:.2f} GiB" in titles
    assert sum(float(title.split()[-2]) for title in titles) == pytest.approx(peak, abs=0.05)


def test_parameters_are_those_of_transformers():
    import torch
    from transformers import Qwen3MoeForCausalLM

    for changes in ({}, {"mlp_only_layers": [1], "tie_word_embeddings": True}):
        config = tiny_config(**changes)
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(config)
        assert sum(parameters.parameters(config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_parameters_in_their_names(name):
    billions = float(name.split("-")[-2 if "-A" in name else -1].removesuffix("B"))
    assert weights(RELEASED[name]) / 1e9 == pytest.approx(billions, rel=0.02)


def test_trained_parameters_are_those_of_the_adapters():
    config = RunConfig.from_dict({"lora": {"r": 16, "target_modules": ["all-linear", "gate"]}})
    job = Job.of(config, PlainShape.of(tiny_config(mlp_only_layers=[1])), 1)
    dense, experts = map(elements, adapters(job))
    assert sum(parameters.trained(job.shape, job.targets, 16).values()) == sum(dense) + sum(experts)


def test_a_config_json_is_read_as_transformers_reads_it(tmp_path):
    config = tiny_config(mlp_only_layers=[1])
    config.save_pretrained(tmp_path)
    assert read_shape(tmp_path) == PlainShape.of(config)
    assert find_shape(str(tmp_path)) == read_shape(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"), ("[]", "cannot be read"), ('{"model_type": "llama"}', "'llama' is not supported"),
        ('{"model_type": "qwen3_moe", "num_experts": 0}', "num_experts = 0 must be a whole number of at least 1"),
        ('{"model_type": "qwen3_moe", "mlp_only_layers": 3}', "cannot be read"),
    ],
)  # fmt: skip
def test_a_config_json_that_is_none_is_refused(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "RTX"], "--gpu RTX: its data sheet is not in the plan; --gpu takes A100, H100, H200, B200"),
        (["--set", "job.model=nobody/nothing"], "its config.json is not on this machine"),
        (["--gpus", "3"], "3 GPUs, but [data.topology] asks for 4"),
        (["--data", "configs"], "--data configs: name a .jsonl file"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(sys, "argv", ["megasft", "plan", "--config", REFERENCE, *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_imbalance_costs_memory_only_where_experts_are_spread():
    spread = plan_of(data={"topology": {"expert_parallel": 4}})
    assert spread.imbalanced.peak > spread.memory.peak
    whole = plan_of(data={"topology": TOPOLOGY})
    assert whole.imbalanced.peak == whole.memory.peak
    assert plan_of(data={"topology": {"expert_parallel": 4}}, imbalance=3.0).imbalanced.peak > spread.imbalanced.peak


def test_short_conversations_cost_no_less_memory_but_less_time(tmp_path):
    (tmp_path / "data.jsonl").write_text(f'{{"text": "{"x" * 390}"}}\n' * 1000)
    dataset = read_dataset(tmp_path)
    assert dataset == Dataset(1000, 100_750)
    full = plan_of(data={"topology": TOPOLOGY})
    short = plan_of(data={"topology": TOPOLOGY}, dataset=dataset, hyperparameters={"gradient_accumulation_steps": 4})
    assert short.memory == full.memory
    assert short.time.seconds / 4 < full.time.seconds / 2
    assert short.steps == 1000 // (4 * 2)
    packed = plan_of(data={"topology": TOPOLOGY, "packing": True}, dataset=dataset)
    assert packed.steps == -(-100_750 // 4095) // 2 + 1
    assert packed.hours * 0.9 < short.hours


def test_more_of_anything_takes_more_memory():
    base = {"lora": {"r": 16}, "data": {"topology": TOPOLOGY}}
    peak = plan_of(**base).memory.peak
    for section, key, more in (
        ("lora", "r", 64), ("hyperparameters", "sequence_length", 65536), ("hyperparameters", "per_device_batch", 16),
    ):  # fmt: skip
        assert plan_of(**base | {section: {key: more}}).memory.peak > peak
    full, selective, without = (
        plan_of(**base, hyperparameters={"parallelism": {"activation_checkpointing": kept}})
        for kept in (True, "selective", False)
    )
    assert peak == full.memory.peak < selective.memory.peak < without.memory.peak
    assert full.time.seconds > selective.time.seconds > without.time.seconds
    names = ("attention", "other products", "experts' products", "elementwise, sorting, copies")
    full, selective, without = ([found.time.parts[name] for name in names] for found in (full, selective, without))
    assert selective[0] == without[0] < full[0]
    assert 0 < selective[1] - without[1] < (full[1] - selective[1]) / 10  # the router's against those of attention
    assert without[2] < selective[2] == full[2]
    assert without[3] < selective[3] < full[3]


def test_the_first_rank_of_a_stage_needs_most_of_its_stage():
    config = RunConfig.from_dict({"data": {"topology": {"tensor_parallel": 2, "pipeline_parallel": 2}}})
    job = Job.of(config, RELEASED["Qwen3-Coder-30B-A3B"], 8)
    peaks = [memory(job.of_rank(rank)).peak for rank in range(8)]
    assert max(peaks[:4]) == peaks[0]
    assert max(peaks[4:]) == peaks[4]


def test_constants_of_the_code_that_the_plan_repeats_without_importing_it_are_equal():
    from megasft.model import loss
    from megasft.plan import memory, state
    from megasft.quant import kernels
    from megasft.train import adapter_norms

    assert (memory.LOSS_CHUNK_BYTES, memory.MIN_CHUNK, memory.MAX_CHUNK) == (
        loss.CHUNK_BYTES, loss.MIN_CHUNK, loss.MAX_CHUNK,
    )  # fmt: skip
    assert memory.NORMS_CHUNK == adapter_norms.CHUNK
    assert state.GROUP == kernels.GROUP


# --- search ---


@pytest.fixture(scope="module")
def ranked():
    return search(load_config(REFERENCE), RELEASED["Qwen3-Coder-30B-A3B"], 4, H200, 8)


def test_without_recomputation_and_tensor_parallel_the_reference_job_takes_about_half_the_time(ranked):
    given = make_plan(load_config(REFERENCE), RELEASED["Qwen3-Coder-30B-A3B"], 4, H200)
    assert (ranked[0].sizes.tensor, ranked[0].sizes.data, ranked[0].recompute) == (1, 4, False)
    assert 1.6 < ranked[0].rate / given.time.tokens_per_second < 2.2


def test_selective_recomputation_wins_where_not_all_activations_fit():
    config = RunConfig.from_dict({"hyperparameters": {"sequence_length": 16384, "gradient_accumulation_steps": 128}})
    found = search(config, RELEASED["Qwen3-Coder-30B-A3B"], 4, H200, 8)
    alone = [
        one for one in found if one.sizes.data == 4 and one.sizes.expert * one.sizes.expert_tensor == one.samples == 1
    ]
    fitting = [one.recompute for one in alone if not one.four_bits and not one.reason]
    assert fitting == ["selective", True]
    chosen = next(one for one in alone if one.recompute == "selective" and not one.four_bits)
    assert (
        RunConfig.from_dict(tomllib.loads(chosen.lines())).hyperparameters.parallelism.activation_checkpointing
        == "selective"
    )


def test_a_candidate_is_planned_as_its_lines_are(ranked, tmp_path):
    for one in (ranked[0], next(one for one in ranked if one.four_bits and one.sizes.expert_tensor > 1)):
        (tmp_path / "run.toml").write_text(one.lines())
        config = load_config(tmp_path / "run.toml", ["lora.dropout=0.05"])
        plan = make_plan(config, RELEASED["Qwen3-Coder-30B-A3B"], 4, H200)
        assert plan.imbalanced.peak == one.peak
        assert plan.time.tokens_per_second == pytest.approx(one.rate, rel=1e-3)
        given = Job.of(load_config(REFERENCE), RELEASED["Qwen3-Coder-30B-A3B"], 4)
        options = [f"{key}={value}" for key, value in remedies.options(one, given).items()]
        again = make_plan(load_config(REFERENCE, options), RELEASED["Qwen3-Coder-30B-A3B"], 4, H200)
        assert again.imbalanced.peak == one.peak


def test_those_that_fit_come_first_and_the_others_say_why(ranked):
    fitting = [one for one in ranked if not one.reason]
    assert [one.rate for one in fitting] == sorted((one.rate for one in fitting), reverse=True)
    assert ranked[: len(fitting)] == fitting
    assert all(one.peak <= H200.memory * 0.94 for one in fitting)
    assert all(one.reason.startswith("memory: ") or one.reason.count(": ") for one in ranked[len(fitting) :])
    assert all(one.samples * one.micro_batches * one.sizes.data == 128 for one in fitting)


def test_every_reason_to_reject_is_met():
    found = search(
        RunConfig.from_dict({"hyperparameters": {"gradient_accumulation_steps": 2}}),
        RELEASED["Qwen3-Coder-30B-A3B"], 16, find_gpu("H100"), 8,
    )  # fmt: skip
    kinds = set(reasons(found))
    assert kinds == {"the model cannot be sharded", "the global batch cannot be cut", "memory"}


def test_the_search_prints_the_winner_as_lines_to_paste(capsys, monkeypatch, tmp_path):
    (tmp_path / "data.jsonl").write_text(f'{{"text": "{"x" * 4000}"}}\n' * 100)
    arguments = ["plan", "--config", REFERENCE, "--search", "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["megasft", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert "not measured" in text
    (tmp_path / "run.toml").write_text(text.partition("the fastest, as lines of the run file:")[2])
    config = load_config(tmp_path / "run.toml")
    assert config.data.packing  # short conversations
    assert config.world_size() == 4


def test_other_gpus_than_the_run_file_has_are_searched(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megasft", "plan", "--config", REFERENCE, "--gpus", "8", "--search"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert "candidates fit 8 x H200" in text
    assert "as the run file says" not in text
    assert "data_parallel = 8" in text


# --- a job that does not fit is refused ---


@pytest.mark.parametrize(
    ("gib", "settings"),
    [
        (35, {"data": {"topology": TOPOLOGY}}),
        (35, {"data": {"topology": {"tensor_parallel": 2}}}),
        (70, {"hyperparameters": {"sequence_length": 32768, "parallelism": {"activation_checkpointing": False}}}),
        (23, {"hyperparameters": {"per_device_batch": 8}, "data": {"topology": TOPOLOGY}}),
    ],
)
def test_a_job_that_does_not_fit_is_refused_with_three_remedies_that_work(gib, settings):
    shape = RELEASED["Qwen3-Coder-30B-A3B"]
    settings.setdefault("hyperparameters", {})["gradient_accumulation_steps"] = 16

    def check(*overrides):
        config = RunConfig.from_dict(settings)
        for override in overrides:
            config = with_override(config, override)
        remedies.refuse_too_large(config, shape, 4, "NVIDIA H100 80GB HBM3", gib * GiB, 4)

    with pytest.raises(UserError) as refused:
        check()
    message = str(refused.value)
    assert f"of which {gib}.0 GiB are free" in message
    offered = message.partition(": add ")[2].rpartition("; --set compute.ignore_plan")[0].split("; or ")
    assert len(offered) == 3
    for one in offered:
        check(*one.removeprefix("--set ").split(" --set "))
    check("compute.ignore_plan=true")


def with_override(config, text):
    key, value = parse_override(text)
    settings = config.model_dump(exclude_unset=True)
    place = settings
    for name in key[:-1]:
        place = place.setdefault(name, {})
    place[key[-1]] = value
    return RunConfig.from_dict(settings)


def test_where_nothing_fits_it_says_so():
    config = RunConfig.from_dict({})
    with pytest.raises(UserError, match="nothing else fits so many of them"):
        remedies.refuse_too_large(config, RELEASED["Qwen3-235B-A22B"], 1, "NVIDIA L40S", 40 * GiB, 1)


# --- advice ---

SHORT_DATA = Dataset(1000, 200_000)
ADVISED = {
    "learning_rate = 5e-06 is 20 times below": ({"hyperparameters": {"learning_rate": 5e-6}}, None),
    "expert_tensor_parallel = 2": ({"data": {"topology": TOPOLOGY}}, None),
    "gate, the router": ({"lora": {"target_modules": ["all-linear", "gate"]}}, None),
    "packing = false": ({}, SHORT_DATA),
    "is 7.5 steps of warm-up": ({"hyperparameters": {"warmup_ratio": 0.03}}, SHORT_DATA),
    "[training.validation] is not enabled": ({"training": {"validation": {"enabled": False}}}, None),
}


@pytest.mark.parametrize("words", ADVISED)
def test_a_setting_far_from_what_others_use_is_named_once(words):
    changes, dataset = ADVISED[words]
    quiet = {"data": {"validation_fraction": 0.02}, "hyperparameters": {"learning_rate": 1e-4}}
    settings = {name: quiet.get(name, {}) | changes.get(name, {}) for name in quiet | changes}
    if "validation" in words:
        settings["data"] = {}
    config = RunConfig.from_dict(settings)
    plan = make_plan(config, RELEASED["Qwen3-Coder-30B-A3B"], 4, H200, 8, dataset)
    assert [words in line for line in advice(config, plan)].count(True) == 1
    if dataset is None:
        assert len(advice(config, plan)) == 1


def test_experts_are_cut_without_a_word_where_they_do_not_fit_whole():
    config = RunConfig.from_dict({"data": {"topology": TOPOLOGY, "validation_fraction": 0.02},
                                  "hyperparameters": {"learning_rate": 1e-4}})  # fmt: skip
    assert advice(config, make_plan(config, RELEASED["Qwen3-Coder-30B-A3B"], 4, find_gpu("H100"))) != []
    small = replace(find_gpu("H100"), memory=48e9)
    assert advice(config, make_plan(config, RELEASED["Qwen3-Coder-30B-A3B"], 4, small)) == []


# --- the run files of the reference job ---

RUN_FILES = {name: f"configs/qwen3_coder_30b{name}.toml" for name in ("", "_qlora", "_fast")}


@pytest.mark.parametrize("name", RUN_FILES)
def test_the_plan_in_the_comment_of_a_run_file_is_true(name):
    plan = make_plan(load_config(RUN_FILES[name]), RELEASED["Qwen3-Coder-30B-A3B"], 4, H200, 4)
    assert f"\n# {one_line(plan)}\n" in Path(RUN_FILES[name]).read_text()


def test_the_run_files_differ_in_what_their_names_say(ranked):
    def of(name, *sections):
        settings = load_config(RUN_FILES[name]).model_dump(exclude={"tags", "job", *sections})
        settings["data"].pop("topology")
        return settings

    assert of("", "training") == of("_qlora", "training")
    assert load_config(RUN_FILES["_qlora"]).training.use_qlora
    kept = of("_fast")
    kept["hyperparameters"] |= {"per_device_batch": 1, "gradient_accumulation_steps": 64}
    kept["hyperparameters"]["parallelism"]["activation_checkpointing"] = True
    assert kept == of("")
    fast = Job.of(load_config(RUN_FILES["_fast"]), RELEASED["Qwen3-Coder-30B-A3B"], 4)
    assert remedies.options(ranked[0], fast) == {}


def test_the_table_of_published_figures_is_what_the_model_says(capsys):
    from benchmarks import published

    published.main()
    assert capsys.readouterr().out in Path("docs/plan.md").read_text()
