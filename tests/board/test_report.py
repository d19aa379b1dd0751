"""report.html, and what a run leaves for it: about.json, and answers that are those of transformers + peft."""

import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megasft.board import answers
from megasft.board.about import write_about
from megasft.board.report import write_at_end, write_report
from megasft.board.svg import load_picture, steps
from megasft.config.parallelism import resolve_topology
from megasft.config.schema import load_config
from megasft.distributed.topology import regroup
from megasft.job import build_model, load_data
from megasft.messages import UserError
from megasft.train.trainer import Trainer
from tests.board.test_server import EVIL
from tests.parity.peft_adapters import base_model, loaded_by_peft
from tests.support.made_runs import make_run
from tests.support.world import make_world

NEW = 12  # tokens of an answer


def run_with_answers(run_file, ranks):
    """A run as `job.run` does it, on the ranks of the pool."""
    answers.MOST_TOKENS = NEW
    config = load_config(run_file, ["logging.answers=3"])
    topology = regroup(resolve_topology(config.data.topology, ranks), config.job.seed)
    train, validation = load_data(config, topology)
    trainer = Trainer(config, topology, build_model(config, topology), train, validation)
    stale = Path(config.job.output_dir) / "answers.json"  # of an earlier run in this folder
    if topology.is_first:
        stale.parent.mkdir()
        stale.write_text('{"answers": []}')
    trainer.fit(lambda: write_about(trainer, topology))
    assert not (topology.is_first and stale.exists())
    answers.write_answers(trainer, topology)


@pytest.fixture(scope="module")
def done(tmp_path_factory, ranks):
    """The folder of a tiny job whose run, on TP=2, is done."""
    folder = tmp_path_factory.mktemp("job")
    run_file = make_world(folder, tensor=2, steps=2)
    tokenizer, model = AutoTokenizer.from_pretrained(folder / "model"), base_model(folder / "model")
    said = by_transformers(model, tokenizer, question(0), [tokenizer.eos_token_id])
    stop = [tokenizer.eos_token_id, next(token for token in said if token != said[0])]  # which ends some answers
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    ranks(2, run_with_answers, run_file, 2)
    return folder


def question(number):
    return f"<|im_start|>user\nvalidation {number}: what comes after {number}?<|im_end|>\n<|im_start|>assistant\n"


def by_transformers(model, tokenizer, text, stop):
    """At most NEW greedy tokens, the one that ends them included."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=stop)[
            0, ids.shape[1] :
        ].tolist()


def test_answers_before_and_after_are_those_of_transformers_and_peft(done):
    found = json.loads((done / "run" / "answers.json").read_text())["answers"]
    assert [answer["reference"] for answer in found] == ["1 does", "3 does!!", "4 does!!!"]
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    stop = json.loads((done / "model" / "generation_config.json").read_text())["eos_token_id"]
    models = {"before": base_model(done / "model"), "after": loaded_by_peft(done / "model", done / "run" / "adapter")}
    ended = []
    for answer, number in zip(found, (0, 2, 3), strict=True):
        assert answer["prompt"] == question(number)
        for name, model in models.items():
            tokens = by_transformers(model, tokenizer, question(number), stop)
            ended.append(tokens[-1] in stop)
            assert answer[name] == tokenizer.decode([token for token in tokens if token not in stop])
    assert any(ended)
    assert any(answer["before"] != answer["after"] for answer in found)


def test_about_has_the_data_the_topology_and_the_versions(done):
    about = json.loads((done / "run" / "about.json").read_text())
    assert about["total_steps"] == 2
    assert about["data"]["training"]["conversations"] == 12
    assert about["data"]["validation"]["conversations"] == 4
    assert about["data"]["validation"]["longest_tokens"] >= about["data"]["validation"]["median_tokens"] > 20
    assert about["topology"] == {"ranks": 2, "tensor_parallel": 2, "expert_parallel": 1, "expert_tensor_parallel": 1,
                                 "pipeline_parallel": 1, "data_parallel": 1}  # fmt: skip
    assert about["environment"]["torch"] == version("torch")


@pytest.mark.parametrize(
    ("mask", "expected"), [([0, 1, 1, 0, 1, 1, 0], (4, 6)), ([1, 1], (0, 2)), ([0, 0], (0, 0)), ([0, 1], (1, 2))]
)
def test_the_last_turn_is_found(mask, expected):
    assert answers.last_turn(torch.tensor(mask, dtype=torch.bool)) == expected


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_report_of_a_real_run_says_how_to_load_and_serve_the_adapter(done):
    path = write_report(done / "run")
    assert path == done / "run" / "report.html"
    text = Parsed(path.read_text()).text
    assert f'AutoModelForCausalLM.from_pretrained({str(done / "model")!r}, dtype="auto"' in text
    assert f"PeftModel.from_pretrained(base, {str(done / 'run' / 'adapter')!r})" in text
    assert (
        f"vllm serve {done / 'model'} --enable-lora --lora-modules run={done / 'run' / 'adapter'} --max-lora-rank 8"
        in text
    )
    found = json.loads((done / "run" / "answers.json").read_text())["answers"]
    assert found[0]["after"].split("\n")[0] in text
    lowest = min(
        line["loss"]
        for line in map(json.loads, (done / "run" / "metrics.jsonl").open())
        if line["kind"] == "validation"
    )
    assert f"{lowest:.4g}" in text
    for words in ("finished, 2 steps", "topology.tensor_parallel", version("torch"), "hyperparameters.learning_rate"):
        assert words in text


def test_a_report_is_one_file_without_scripts_and_escapes_everything(tmp_path):
    run = make_run(tmp_path / EVIL.replace("/", "\u2215"), steps=600)
    text = json.dumps(EVIL)
    (run / "config.toml").write_text(f"[job]\nmodel = {text}\n[tags]\n{text} = {text}\n")
    (run / "answers.json").write_text(
        json.dumps({"answers": [{"prompt": EVIL, "before": "\ud800", "after": EVIL, "reference": EVIL}]})
    )
    (run / "about.json").write_text(json.dumps({EVIL: {EVIL: EVIL}}))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "event", "step": 601, "time": 1.8e9, "event": EVIL, "reason": EVIL}) + "\n")
        file.write(
            json.dumps({"kind": "norms", "step": 601, "time": 1.8e9, "parameters": {"lora_A": {EVIL: 1.0}}}) + "\n"
        )
    page = Parsed(write_report(run, tmp_path / "out.html").read_text())
    assert page.text.count("<script>alert(2)") >= 8
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "a"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,"), tag
    assert "url(" not in "".join(re.findall(r"<style>(.*?)</style>", (tmp_path / "out.html").read_text(), re.DOTALL))
    assert sum(tag == "figure" for tag, _ in page.tags) > 20
    assert (tmp_path / "out.html").stat().st_size < 1_000_000


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "time": 1.0, "loss": 2.0, "grad_norm": 0.0}\n'
    )
    assert "<circle" in write_report(tmp_path / "run").read_text()


def test_what_is_no_run_and_what_cannot_be_written_are_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: is not a run directory (metrics.jsonl)")):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", steps=2)
    with pytest.raises(UserError, match=r"cannot be written .* with --out"):
        write_report(run, tmp_path / "nowhere" / "report.html")
    write_at_end(str(tmp_path / "nothing"))
    assert "is not a run directory" in capsys.readouterr().err


def test_the_picture_of_the_load_has_a_pixel_an_expert():
    import base64
    import io

    from PIL import Image

    tokens = np.array([[0, 10, 20], [5, 5, 5]], np.float32)
    data = base64.b64decode(load_picture(tokens).partition(",")[2])
    image = Image.open(io.BytesIO(data))
    assert image.size == (3, 2)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(59, 111, 212), (236, 237, 240), (210, 105, 30)]
    assert image.getpixel((0, 1)) == (236, 237, 240)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.7), (-3, 5), (1e-9, 3e-9), (0, 123456), (5, 5.001)])
def test_ticks_are_round_and_within_the_range(low, high):
    found = steps(low, high, 5)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in found)
