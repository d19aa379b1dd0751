"""A user's mistake ends with exit code 2 and one line that names it and what would work."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from megasft.config.values import ALL_LINEAR, LINEAR_LAYERS
from megasft.messages import UserError
from megasft.model.hub import find_model
from tests.parity.reference import random_adapter, write_adapter
from tests.support.speech import assert_one_line, without_progress

# what the tiny model takes on two ranks of tensor parallel
QLORA = "--set training.use_qlora=true --set quant.block_size=32 --set data.topology.expert_tensor_parallel=1"


def in_run_file(old: str, new: str):
    def spoil(world: Path) -> None:
        text = (world / "job.toml").read_text()
        assert old in text
        (world / "job.toml").write_text(text.replace(old, new))

    return spoil


def in_model_config(**changes):
    def spoil(world: Path) -> None:
        path = world / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def in_weights(change):
    def spoil(world: Path) -> None:
        path = world / "model" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return spoil


def without(*names: str):
    def spoil(world: Path) -> None:
        for name in names:
            (world / name).unlink()

    return spoil


def with_text(name: str, text: str):
    def spoil(world: Path) -> None:
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_text(text)

    return spoil


def with_line(text: str):
    """Insert a line into the training data, as the third."""

    def spoil(world: Path) -> None:
        lines = (world / "train.jsonl").read_text().splitlines()
        (world / "train.jsonl").write_text("\n".join([*lines[:2], text, *lines[2:]]) + "\n")

    return spoil


def with_adapter(change=lambda adapter: None, r: int = 4, targets=ALL_LINEAR, **sizes):
    def spoil(world: Path) -> None:
        settings = json.loads((world / "model" / "config.json").read_text()) | sizes
        adapter = random_adapter(Qwen3MoeConfig.from_dict(settings), r, frozenset(targets))
        change(adapter)
        write_adapter(adapter, world / "adapter", r, 2 * r)

    return spoil


def truncated(world: Path) -> None:
    path = world / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(world: Path) -> None:
    path = world / "model" / "model.safetensors"
    torch.save(load_file(path), world / "model" / "pytorch_model.bin")
    path.unlink()


def pickled_adapter(world: Path) -> None:
    with_adapter()(world)
    (world / "adapter" / "adapter_model.safetensors").rename(world / "adapter" / "adapter_model.bin")


def index_of_a_missing_file(world: Path) -> None:
    tensors = load_file(world / "model" / "model.safetensors")
    (world / "model" / "model.safetensors").rename(world / "model" / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + (i == 0)}-of-00002.safetensors" for i, name in enumerate(tensors)}
    (world / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def nothing(world: Path) -> None: ...


# what is wrong, arguments ({} is the folder of the job), words that the line must hold
BEFORE_THE_LAUNCH = {
    "no such run file": (nothing, "--config {}/nope.toml", ["nope.toml", "no such file"]),
    "run file is no TOML": (in_run_file("r = 4", "r = = 4"), "", ["job.toml:11", "not valid TOML"]),
    "unknown key": (in_run_file("alpha = 8", "alhpa = 8"), "", ["job.toml:12", "[lora] alhpa = 8", "did you mean alpha"]),
    "wrong type": (nothing, "--set lora.r=eight", ["--set lora.r=eight", "must be a valid integer"]),
    "two ranks of LoRA": (
        in_run_file("[hyperparameters]", "[hyperparameters]\nlora_rank = 8"), "",
        ["job.toml:16", "lora_rank = 8", "contradicts", "[lora] r = 4"],
    ),
    "unknown target module": (nothing, "--set lora.target_modules=q_prj", ["q_prj", "did you mean 'q_proj'"]),
    "blocks that do not divide a rank's inputs": (
        nothing, "--set training.use_qlora=true --set quant.block_size=32 --set data.topology.expert_tensor_parallel=2",
        ["block_size = 32", "the 16 inputs", "experts' down_proj", "moe_intermediate_size 32 / expert_tensor_parallel 2",
         "set [data.topology] expert_tensor_parallel = 1"],
    ),
    "blocks that do not divide the model's inputs": (
        nothing, "--set training.use_qlora=true --set quant.block_size=128",
        ["block_size = 128", "the 64 inputs", "q_proj", "hidden_size 64", "set block_size = 64"],
    ),
    "experts that no block divides": (
        in_model_config(moe_intermediate_size=24), "--set training.use_qlora=true --set data.topology.expert_tensor_parallel=1",
        ["block_size = 64", "the 24 inputs", "moe_intermediate_size 24", "use_qlora = false"],
    ),
    "fp16": (nothing, "--set hyperparameters.parallelism.fp16=true", ["fp16", "bf16 = true"]),
    "DeepSpeed stage 3": (
        nothing, "--set hyperparameters.parallelism.deepspeed_stage=3", ["deepspeed_stage", "stage 3", "[data.topology]"]
    ),
    "topology on another number of ranks": (
        nothing, "--ranks 3",
        ["--ranks 3: ", "asks for 2 (tensor_parallel 2", 'add --ranks 2, or --set "data.topology = {tensor_parallel = 1, data_parallel = 3}"'],
    ),
    "heads that tensor parallel does not divide": (
        nothing, "--set data.topology.tensor_parallel=8", ["tensor_parallel = 8", "num_key_value_heads = 4", "1, 2, 4"]
    ),
    "no data named": (in_run_file("data = ", "# data = "), "", ["[job] data", "--dataset"]),
    "no such data file": (without("train.jsonl"), "", ["[job] data", "world/train.jsonl", "no such file"]),
    "data of an unknown kind": (nothing, "--dataset {}/job.toml", ["[job] data", "job.toml", ".jsonl"]),
    "no such validation file": (without("validation.jsonl"), "", ["[data] validation_path", "validation.jsonl"]),
    "output folder is a file": (with_text("run", ""), "", ["[job] output_dir", "world/run", "is not a folder"]),
    "output folder below a file": (nothing, "--set job.output_dir={}/job.toml/run", ["job.toml is not a folder"]),
    "no such model folder": (nothing, "--set job.model={}/modle", ["[job] model", "world/modle", "no such folder"]),
    "no such model on the hub": (
        nothing, "--set job.model=megasft-tests/no-such-model", ["[job] model", "no-such-model", "the hub", "a model folder"]
    ),
    "model folder without configuration": (without("model/config.json"), "", ["world/model", "no config.json"]),
    "configuration is no JSON": (with_text("model/config.json", "{"), "", ["config.json", "cannot be read"]),
    "another kind of model": (in_model_config(model_type="llama"), "", ["config.json", "'llama'", "'qwen3_moe'"]),
    "configuration of no model": (in_model_config(num_attention_heads=0), "", ["config.json", "num_attention_heads = 0"]),
    "unknown kind of rope": (in_model_config(rope_parameters={"rope_type": "spiral"}), "", ["rope_parameters", "spiral"]),
    "quantized model": (in_model_config(quantization_config={"quant_method": "fp8"}), "", ["quantization_config", "bf16"]),
    "no tokenizer": (
        without("model/tokenizer.json", "model/tokenizer_config.json"), "", ["world/model", "no tokenizer"]
    ),
    "more tokens than embeddings": (
        in_model_config(vocab_size=200), "", ["259 tokens", "vocabulary of 200", "belongs to the model"]
    ),
    "no weights": (without("model/model.safetensors"), "", ["world/model", "no model.safetensors"]),
    "pickled weights": (pickled, "", ["pytorch_model.bin", "convert them to safetensors"]),
    "truncated weights": (truncated, "", ["model.safetensors", "corrupted"]),
    "index of a missing file": (index_of_a_missing_file, "", ["model-00002-of-00002.safetensors", "missing"]),
    "no such adapter": (nothing, "--set job.init_adapter={}/adapter", ["[job] init_adapter", "world/adapter", "no such"]),
    "no adapter in the folder": (nothing, "--set job.init_adapter={}", ["world", "adapter_config.json"]),
    "pickled adapter": (
        pickled_adapter, "--set job.init_adapter={}/adapter", ["adapter_model.bin", "save it as adapter_model.safetensors"]
    ),
    "adapter of another rank": (
        with_adapter(r=8), "--set job.init_adapter={}/adapter", ["adapter_config.json", "r = 8", "[lora] r = 4"]
    ),
    "adapter of another rank, and weights that are not looked at": (
        lambda world: with_adapter(r=8)(world) or in_weights(lambda tensors: tensors.clear())(world),
        "--set job.init_adapter={}/adapter", ["[lora] r = 4"],
    ),
    "adapter of another model": (
        with_adapter(hidden_size=32), "--set job.init_adapter={}/adapter", ["adapter_model.safetensors", "another model"]
    ),
    "adapter of other layers": (
        with_adapter(), "--set job.init_adapter={}/adapter --set lora.target_modules=q_proj",
        ["adapts all-linear, but", "asks for q_proj; set [lora] target_modules = [\"all-linear\"] to continue from it"],
    ),
    "adapter with a router": (
        with_adapter(targets=LINEAR_LAYERS), "--set job.init_adapter={}/adapter",
        ["adapts all-linear, gate, but", "asks for all-linear; set [lora] target_modules = [\"all-linear\", \"gate\"] to"],
    ),
    "empty data file": (with_text("train.jsonl", "\n \n"), "", ["[job] data", "train.jsonl", "holds no conversation"]),
    "empty validation file": (with_text("validation.jsonl", ""), "", ["[data] validation_path", "holds no conversation"]),
    "a first line that is no JSON": (
        with_text("train.jsonl", "hello\n"), "", ["[job] data", "train.jsonl:1", "not JSON"]
    ),
    "no run file named": (nothing, "", ["--config", "megasft train --help"]),
    "unknown option": (nothing, "--lora-rank 8", ["--lora-rank", "megasft train --help"]),
}  # fmt: skip

# What takes ranks to find: they read the data to its end, and the weights.
ON_THE_RANKS = {
    "topology on another number of ranks": (
        in_run_file("data_parallel = 1", "data_parallel = 2"), "",
        ["launched 2 ranks", "asks for 4", "topology = {", "--nproc-per-node 4"],
    ),
    "a line that is no JSON": (with_line('{"messages": ['), "", ["train.jsonl:3", "not JSON"]),
    "a conversation without assistant": (
        with_line('{"messages": [{"role": "user", "content": "hello?"}]}'), "", ["train.jsonl:3", "assistant"]
    ),
    "weights lack a tensor": (
        in_weights(lambda tensors: tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight")), "",
        ["world/model", "no tensor", "model.layers.2.mlp.experts.5.up_proj.weight"],
    ),
    "weights have a tensor too many": (
        in_weights(lambda tensors: tensors.update({"model.layers.9.extra": torch.ones(2)})), "",
        ["model.safetensors", "'model.layers.9.extra'", "config.json"],
    ),
    "weights have a tensor of another shape": (
        in_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)})), "",
        ["model.safetensors", "'model.norm.weight'", "[65]", "[64]"],
    ),
    "weights that cannot be quantized": (
        in_weights(lambda tensors: tensors["model.layers.2.mlp.experts.5.up_proj.weight"].__setitem__((3, 4), torch.nan)),
        QLORA, ["model.layers.2.mlp.experts.5.up_proj.weight", "not finite", "use_qlora = false"],
    ),
    "a cache that cannot be written": (
        with_text("cache", ""), f"{QLORA} --set quant.cache_dir={{}}/cache", ["[quant] cache_dir", "world/cache", "cannot be written"]
    ),
    "adapter with NaN": (
        with_adapter(lambda adapter: next(iter(adapter.values())).fill_(torch.nan)), "--set job.init_adapter={}/adapter",
        ["adapter_model.safetensors", "layers.0.self_attn.q_proj", "not finite"],
    ),
}  # fmt: skip


def arguments(case: str, text: str, world: Path) -> list[str]:
    config = [] if "--config" in text or case == "no run file named" else ["--config", f"{world}/job.toml"]
    return ["train", *config, *text.format(*[world] * text.count("{}")).split()]


@pytest.mark.parametrize("case", BEFORE_THE_LAUNCH)
def test_a_mistake_is_refused_before_the_launch(megasft, world, case):
    spoil, text, words = BEFORE_THE_LAUNCH[case]
    spoil(world)
    ended = megasft(*arguments(case, text, world))
    assert_one_line(without_progress(ended.said), words)
    assert ended.codes == [2]
    assert not (world / "run").is_dir()


@pytest.mark.parametrize("case", ON_THE_RANKS)
def test_a_mistake_that_only_ranks_find_is_reported_once(megasft, world, case):
    spoil, text, words = ON_THE_RANKS[case]
    spoil(world)
    ended = megasft(*arguments(case, text, world), ranks=2)
    assert_one_line(without_progress(ended.said), words)
    assert ended.codes == [2, 2]
    assert not (world / "run").exists()


@pytest.mark.parametrize("case", ["no such data file", "output folder is a file", "truncated weights"])
def test_torchruns_ranks_refuse_what_the_launcher_would(megasft, world, case):
    spoil, text, words = BEFORE_THE_LAUNCH[case]
    spoil(world)
    ended = megasft(*arguments(case, text, world), ranks=2)
    assert_one_line(without_progress(ended.said), words)
    assert ended.codes == [2, 2]


@pytest.mark.parametrize("case", ["unknown key", "topology on another number of ranks"])
def test_the_first_rank_with_an_error_reports_it(megasft, world, case):
    # torchrun ends the others as soon as one has exited.
    spoil, text, words = (
        BEFORE_THE_LAUNCH | {"topology on another number of ranks": (nothing, "", ["launched 3 ranks"])}
    )[case]
    spoil(world)
    ended = megasft(*arguments(case, text, world), ranks=3, only=1)
    assert_one_line(without_progress(ended.said), words)
    assert ended.codes == [2]


def test_the_checks_before_the_launch_import_neither_megatron_core_nor_a_model(world):
    with_adapter(r=8)(world)
    code = (
        "import atexit, json, sys; from megasft import cli\n"
        f"atexit.register(lambda: json.dump(sorted(sys.modules), open({str(world / 'modules.json')!r}, 'w')))\n"
        f"sys.argv = ['megasft', 'train', '-c', '{world}/job.toml', '--set', 'job.init_adapter={world}/adapter']\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert_one_line(ended.stderr, ["r = 8, but [lora] r = 4"])
    modules = set(json.loads((world / "modules.json").read_text()))
    assert "megasft.adapters.fit" in modules, "it was the last check"
    assert not [name for name in modules if name.startswith("megatron") or ".modeling_qwen" in name]


def test_a_line_break_in_a_path_does_not_break_the_error_line(megasft, world):
    ended = megasft("train", "--config", f"{world}/job.toml", "--dataset", "no\nsuch.jsonl")
    assert_one_line(without_progress(ended.said), ["[job] data", "no such.jsonl"])


def test_the_unspoiled_job_runs(megasft, world):
    ended = megasft("train", "--config", f"{world}/job.toml")
    assert ended.said == "nothing was refused before the launch\n"
    ended = megasft("train", "--config", f"{world}/job.toml", ranks=2)
    assert ended.codes == [0, 0]
    assert "the router" not in ended.said, "all-linear trains none"


def test_an_unresponsive_hub_fails_within_15_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UserError, match="the download from the hub failed"):
            find_model("megasft-tests/no-such-model")
        assert time.monotonic() - started < 15


def test_ranks_refuse_a_store_where_another_jobs_ranks_meet(world, megasft):
    ended = megasft("train", "--config", str(world / "job.toml"), ranks=2, met=True)
    assert ended.codes == [2, 2]
    assert_one_line(
        ended.said, ["127.0.0.1:", "another job's ranks meet (launcher: host ", "process 1)", "--master-port"]
    )
