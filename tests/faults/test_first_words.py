"""What a run says of its data and its schedule before it trains, and that it then does as it says."""

import json
import re
import tomllib
from datetime import date, timedelta
from pathlib import Path

import pytest

from megasft import job
from tests.parallel.resume import lines
from tests.support.forked import Command
from tests.support.world import make_world

DATED = (
    "{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\\n' }}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A job of one rank whose chat template writes the date, and whose model was made for 64 positions."""
    folder = tmp_path_factory.mktemp("dated")
    make_world(folder)
    (folder / "model" / "chat_template.jinja").write_text(DATED)
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64}))
    return folder


def today(path: str) -> None:
    """Nothing else than usual."""


def tomorrow(path: str) -> None:
    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.today() + timedelta(1)

    job.date = Tomorrow  # type: ignore[misc]


def start(world: Path, *settings: str, in_rank=today) -> Command:
    own = [f"data.cache_dir='{world}/cache'", "hyperparameters.warmup_ratio=0.03", "checkpoint.keep=9", *settings]
    own.append("lora.target_modules='all-linear,gate'")
    overrides = [argument for setting in own for argument in ("--set", setting)]
    return Command(["train", "--config", str(world / "job.toml"), *overrides], world / "err", in_rank, (str(world),))


def test_the_date_is_kept_warm_up_leaves_a_step_and_samples_beyond_the_model_are_counted_and_a_router_is_named(world):
    """One run of one step, resumed on the next day."""
    command = start(world, "hyperparameters.max_steps=1")
    assert command.wait() == 0, command.said()
    day = tomllib.loads((world / "run" / "config.toml").read_text())["data"]["template_date"]
    assert abs(day - date.today()) <= timedelta(1)
    assert f"writes today's date; this run keeps {day}, on whatever day it is resumed" in command.said()
    assert "warmup_ratio = 0.03 would make warm-up, which starts at learning rate 0, of the only step" in command.said()
    (line,) = (line for line in command.said().splitlines() if "target_modules has gate, the router" in line)
    assert "vLLM" in line
    assert "SGLang" in line
    assert "`megasft merge` keeps it" in line
    assert re.search(r"megasft: \d+ of 16 samples are longer than the 64 positions", command.said())
    (step,) = (line for line in lines(world / "run") if line["kind"] == "train")
    assert step["lr"] == 1e-2

    command = start(world, "hyperparameters.max_steps=2", in_rank=tomorrow)
    assert command.wait() == 0, command.said()
    assert f"this run keeps {day}" in command.said()
    assert [line["step"] for line in lines(world / "run") if line["kind"] == "train"] == [1, 2]

    command = start(world, "hyperparameters.max_steps=3", "data.template_date=2001-01-01")
    assert command.wait() == 2
    assert "template_args or template_date have changed; restore that" in command.said()
