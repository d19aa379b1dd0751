"""`megasft evaluate` from the command line: what it prints and writes, and what it refuses before a rank is launched."""

import json

import pytest

from megasft.adapters.export import export_adapter
from megasft.config.values import ALL_LINEAR
from tests.faults.test_generate import other_adapter, with_text
from tests.parity.reference import random_adapter, tiny_config, write_adapter
from tests.support.speech import assert_one_line


@pytest.fixture
def adapter(world):
    """A run directory with an adapter of the default layers."""
    config = tiny_config(vocab_size=264, mlp_only_layers=[])
    write_adapter(random_adapter(config, 4, frozenset(ALL_LINEAR)), world / "plain", 4, 8)
    export_adapter(world / "plain", world / "run" / "adapter", "per-expert", str(world / "model"))


def test_results_are_on_standard_output_and_conversations_in_the_file(megasft, world, adapter):
    output = world / "conversations.jsonl"
    arguments = ["evaluate", f"{world}/job.toml", "--generate", "2", "--max-new-tokens", "4", "--output", str(output)]
    ended = megasft(*arguments, ranks=2)
    assert ended.codes == [0, 0], ended.said
    assert "4 conversations, 4 samples" in ended.said
    rows = {line.split("  ")[0].strip(): line.split() for line in ended.printed.splitlines()}
    as_json = json.loads(megasft(*arguments[:-2], "--json", ranks=2).printed)
    loss = as_json["metrics"]["loss"]
    shown = f"{loss['count']} {loss['base']:.4f} {loss['adapter']:.4f} {loss['difference']:+.4f}"
    assert " ".join(rows["loss"]).startswith(f"loss {shown} {loss['low']:+.4f} to {loss['high']:+.4f}")
    assert "exact match" in rows
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [(f"{world}/validation.jsonl", i) for i in range(1, 5)]
    tokens = [line["adapter"]["tokens"] for line in lines]
    assert sum(line["adapter"]["loss"] * n for line, n in zip(lines, tokens, strict=True)) / sum(tokens) == pytest.approx(loss["adapter"])  # fmt: skip
    assert [len(line.get("answers", [])) for line in lines] == [1, 0, 0, 1]
    answer = lines[0]["answers"][0]
    assert (answer["turn"], answer["reference"], answer["base"]["tokens"]) == (1, "1 does", 4)
    assert answer["adapter"].keys() == {"text", "tokens", "exact_match", "cut_off"}


QUESTION = '{"messages": [{"role": "user", "content": "a"}]}\n'
# what is wrong, arguments ({} is the folder of the job), words that the line must hold
BEFORE_THE_LAUNCH = {
    "no data": (None, "{}/model", ["nothing to evaluate on", "name DATA"]),
    "no such data": (None, "{}/model {}/nope.jsonl", ["nope.jsonl", "no such file"]),
    "no assistant": (with_text("a.jsonl", QUESTION), "{}/model {}/a.jsonl", ["a.jsonl:1", "no assistant message"]),
    "none to answer": (None, "{}/model {}/train.jsonl --generate 0", ["--generate 0", "1 or more, or all"]),
    "adapter of another model": (
        other_adapter(hidden_size=32), "{}/model {}/train.jsonl --adapter {}/other", ["another model"]
    ),
    "ranks that hold no whole model": (
        None, "{}/model {}/train.jsonl --ranks 3 --tensor-parallel 2", ["3 ranks", "one model on 2", "a multiple"]
    ),
    "a setting that is none": (None, "{}/model {}/train.jsonl --set data.train_on=first", ["--set data.train_on=first", "last"]),
    "nowhere to write": (None, "{}/model {}/train.jsonl --output {}/no/x.jsonl", ["--output", "cannot be written"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_THE_LAUNCH)
def test_a_mistake_is_refused_before_the_launch(megasft, world, case):
    spoil, text, words = BEFORE_THE_LAUNCH[case]
    if spoil:
        spoil(world)
    ended = megasft("evaluate", *text.format(*[world] * text.count("{}")).split())
    assert_one_line(ended.said, words)
    assert ended.codes == [2]


def test_a_later_line_that_cannot_be_used_is_refused_before_weights_are_read(megasft, world):
    (world / "model" / "model.safetensors").write_bytes(b"")
    (world / "a.jsonl").write_text((world / "train.jsonl").read_text() + QUESTION)
    ended = megasft("evaluate", f"{world}/model", f"{world}/a.jsonl", "--dtype", "fp32", ranks=1)
    assert ended.codes == [2]
