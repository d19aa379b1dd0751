"""A resumed run whose data have changed is told which file or setting has."""

import json
import re
from pathlib import Path

import pytest

from megasft.config.schema import RunConfig
from megasft.data.dataset import Batches, Mix, Samples
from megasft.data.identity import data_identity, refuse_other_data, refuse_other_sources
from megasft.data.token_cache import prepare
from megasft.data.tokenize import Recipe
from megasft.messages import UserError

REMEDY = '; restore that, or start a new run (set another [job] output_dir, or pass --resume never), or set [checkpoint] allow_changed = ["data"] to resume on the new data'


def write(path: Path, word: str, count: int = 6) -> Path:
    turns = ["one two three four five six seven eight", word, "again", f"{word} and {word}"]
    roles = ["user", "assistant"] * 2
    line = json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]})
    path.write_text(f"{line}\n" * count)
    return path


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig.from_dict({
        "job": {"data": str(write(tmp_path / "data.jsonl", "Paris")), "seed": 3},
        "data": {"cache_dir": str(tmp_path / "cache")}, "hyperparameters": {"sequence_length": 256},
    })  # fmt: skip


def changed(config: RunConfig, **sections: dict) -> RunConfig:
    settings = config.model_dump(exclude_none=True)
    for section, keys in sections.items():
        settings[section] |= keys
    return RunConfig.from_dict(settings)


def identity(config: RunConfig, tokenizer) -> dict:
    """As a checkpoint holds it."""
    data, length = config.data, config.hyperparameters.sequence_length
    recipe = Recipe(length, data.train_on, data.overlong, data.parse_special_in_text)
    sources = config.training_data()
    samples = tuple(Samples.open(prepare(one.path, tokenizer, recipe, "stop", data.cache_dir)) for one in sources)
    mix = Mix(samples, tuple(source.weight for source in sources))
    if data.validation_fraction:
        mix, _ = mix.split(data.validation_fraction, config.job.seed)
    batches = Batches.over(mix, 4, config.job.seed, length if data.packing else None)
    return json.loads(json.dumps(data_identity(mix, batches)))


# What has changed, as the refusal names it. Of the first, only the samples can tell that they matter.
BY_THEIR_TOKENS = {
    "[hyperparameters] sequence_length = 64 (was 256)": {"hyperparameters": {"sequence_length": 64}},
    '[data] train_on = "last" (was "all")': {"data": {"train_on": "last"}},
    "3 samples (were 6); did [data] validation_fraction": {
        "data": {"validation_fraction": 0.5}, "training": {"validation": {"enabled": True}}
    },
    "[job] seed = 4 (was 3)": {"job": {"seed": 4}},
}  # fmt: skip
BEFORE_THE_LAUNCH = {
    "[data] packing = true (was false)": {"data": {"packing": True}},
}


@pytest.mark.parametrize("named", [*BY_THEIR_TOKENS, *BEFORE_THE_LAUNCH])
def test_a_changed_setting_is_named(config, with_template, named):
    chat = with_template("chatml")
    then = identity(config, chat)
    other = changed(config, **(BY_THEIR_TOKENS | BEFORE_THE_LAUNCH)[named])
    with pytest.raises(UserError) as refusal:
        refuse_other_data(then, identity(other, chat), allow_changed=False)
    assert str(refusal.value).startswith(f"the training data are not those of the checkpoint: {named}")
    assert str(refusal.value).endswith(REMEDY)
    assert refuse_other_data(then, identity(other, chat), allow_changed=True)


def test_the_same_data_are_the_same_data(config, with_template):
    then = identity(config, with_template("chatml"))
    assert not refuse_other_data(then, identity(config, with_template("chatml")), allow_changed=False)
    refuse_other_sources(then, config)


def test_another_setting_that_leaves_the_tokens_as_they_are_changes_nothing(config, with_template):
    then = identity(config, with_template("chatml"))
    other = changed(config, data={"overlong": "drop"}, hyperparameters={"sequence_length": 300})
    assert not refuse_other_data(then, identity(other, with_template("chatml")), allow_changed=False)
    refuse_other_sources(then, other)


def test_another_chat_template_is_named(config, with_template):
    then, now = identity(config, with_template("chatml")), identity(config, with_template("header_ids"))
    with pytest.raises(
        UserError,
        match=r"checkpoint: the model.s tokenizer, its chat template, \[data\] template_args or template_date have changed;",
    ):
        refuse_other_data(then, now, allow_changed=False)


@pytest.mark.parametrize("named", BEFORE_THE_LAUNCH)
def test_settings_that_surely_matter_are_refused_without_a_token(config, with_template, named):
    then = identity(config, with_template("chatml"))
    with pytest.raises(UserError, match=re.escape(f"checkpoint: {named}")):
        refuse_other_sources(then, changed(config, **BEFORE_THE_LAUNCH[named]))


def test_other_content_is_refused_without_a_token(config, with_template, tmp_path):
    then = identity(config, with_template("chatml"))
    path = write(tmp_path / "data.jsonl", "Rome")
    with pytest.raises(UserError, match=re.escape(f"checkpoint: {path} has other content;")):
        refuse_other_sources(then, config)
    with pytest.raises(UserError, match="checkpoint: the content has changed;"):
        refuse_other_data(then, identity(config, with_template("chatml")), allow_changed=False)


def test_of_a_mix_the_source_is_named(config, with_template, tmp_path):
    paths = [str(write(tmp_path / f"{word}.jsonl", word)) for word in ("Paris", "Rome")]

    def mix(*weights: float) -> RunConfig:
        entries = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=False)]
        settings = config.model_dump(exclude_none=True)
        del settings["job"]["data"]
        settings["data"]["mix"] = entries
        return RunConfig.from_dict(settings)

    then = identity(mix(1.0, 1.0), with_template("chatml"))
    with pytest.raises(UserError, match=r"the weight of source 2 of \[data\] mix is 0\.5 \(was 1\.0\);"):
        refuse_other_sources(then, mix(1.0, 0.5))
    with pytest.raises(UserError, match=r"1 training files in place of 2;"):
        refuse_other_data(then, identity(mix(1.0), with_template("chatml")), allow_changed=False)
    write(Path(paths[1]), "Bern")
    with pytest.raises(UserError, match=r"Rome\.jsonl has other content;"):
        refuse_other_sources(then, mix(1.0, 1.0))
    with pytest.raises(UserError, match=r"the content of source 2 of \[data\] mix has changed;"):
        refuse_other_data(then, identity(mix(1.0, 1.0), with_template("chatml")), allow_changed=False)


@pytest.mark.parametrize("damage", [{}, {"made_of": 3, "sources": None}, {"made_of": [None], "sources": [3]}])
def test_what_an_older_checkpoint_does_not_say_is_left_to_the_tokens(config, with_template, damage):
    then = identity(config, with_template("chatml"))
    refuse_other_sources({key: then[key] for key in ("samples", "content")} | damage, config)
    old = {key: value for key, value in then.items() if key != "made_of"}
    assert not refuse_other_data(old, then, allow_changed=False)
    with pytest.raises(UserError, match="not those of the checkpoint: "):
        refuse_other_data(damage, then, allow_changed=False)
