"""The command line says what it takes, and a question or a typo costs no import of torch or megatron-core."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from megasft import cli
from megasft.config.schema import load_config
from megasft.config.starter import run_file, write_run_file
from megasft.messages import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
COMMANDS = (
    "init",
    "train",
    "plan",
    "validate",
    "convert",
    "generate",
    "evaluate",
    "merge",
    "export",
    "dashboard",
    "report",
)
HEAVY = ("torch", "transformers", "megatron", "peft", "numpy", "pyarrow")


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["megasft", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0, *capsys.readouterr()


# --- help ---


def test_help_names_every_command_and_shows_examples(capsys, monkeypatch):
    code, text, _ = run(capsys, monkeypatch, "--help")
    assert code == 0
    assert "Fine-tune Qwen3 mixture-of-experts models with LoRA" in text
    assert re.findall(r"^  (\w+)  +[A-Z]", text.partition("Commands:")[2], re.MULTILINE) == list(COMMANDS)
    assert "--version" in text
    assert "--install-completion" in text
    assert "Examples:\n    megasft init run.toml" in text
    assert run(capsys, monkeypatch)[1] == text, "without a command it shows the same"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_shows_examples_that_parse(command, capsys, monkeypatch):
    code, text, _ = run(capsys, monkeypatch, command, "--help")
    assert code == 0
    examples = re.findall(rf"^    megasft {command} (.*)$", text, re.MULTILINE)
    assert len(examples) >= 2
    parser = typer.main.get_command(cli.app).commands[command]
    for example in examples:
        arguments = re.split(r"\s{3,}", example)[0].partition(" > ")[0].replace('"', "").split()
        if "haiku" in example:
            arguments = [*arguments[:2], "Write a haiku."]
        parser.make_context(command, arguments, resilient_parsing=False)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["in place of [job] data", "what [data.topology] or [compute] asks for", "default: [checkpoint] resume"]),
        ("validate", ["[data] from a run file"]),
        ("merge", ["[quant]"]),
    ],
)  # fmt: skip
def test_help_keeps_the_names_of_sections(command, words, capsys, monkeypatch):
    text = " ".join(run(capsys, monkeypatch, command, "--help")[1].split())
    for word in words:
        assert word in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command):
    for parameter in typer.main.get_command(cli.app).commands[command].params:
        assert len(parameter.help or "") > 10, parameter.name


def test_version(capsys, monkeypatch):
    assert run(capsys, monkeypatch, "--version")[:2] == (0, "megasft 0.1.0\n")


def test_a_misspelt_command_or_option_is_one_line_that_names_the_help(capsys, monkeypatch):
    assert run(capsys, monkeypatch, "trian") == (
        2, "", "megasft: No such command 'trian'. Did you mean 'train'?; see megasft --help\n"
    )  # fmt: skip
    code, _, said = run(capsys, monkeypatch, "train", "--confg", "x")
    assert code == 2
    assert re.fullmatch(r"megasft: No such option: --confg.*; see megasft train --help\n", said), said


def test_completion_knows_the_commands():
    environment = {"_MEGASFT_COMPLETE": "complete_bash", "COMP_WORDS": "megasft va", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "megasft"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["validate"], done.stderr


# --- imports ---


def imported(*arguments: str, cwd: Path) -> tuple[int, str, set[str]]:
    """Exit code and standard error of the command in a process of its own, and the top-level modules it imported."""
    code = (
        "import json, sys\n"
        "from megasft import cli\n"
        f"sys.argv = {['megasft', *arguments]!r}\n"
        "try:\n    cli.main()\n"
        "finally:\n    json.dump(sorted(sys.modules), open('modules.json', 'w'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stderr, set(json.loads((cwd / "modules.json").read_text()))


@pytest.fixture
def folder(tmp_path) -> Path:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    (tmp_path / "run.toml").write_text('[job]\nmodel = "./model"\ndata = "data.jsonl"\n')
    (tmp_path / "typo.toml").write_text("[lora]\nalhpa = 8\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    return tmp_path


# arguments, exit code, words of the refusal
LIGHT = {
    "help": ("train --help", 0, ""),
    "init": ("init new.toml --model a/b --gpus 2", 0, ""),
    "a typo in the run file": ("train --config typo.toml", 2, "did you mean alpha?"),
    "an unknown option": ("train --confg run.toml", 2, "--confg"),
    "no such data": ("train --config run.toml --dataset nope.jsonl", 2, "no such file"),
    "empty data": ("train --config run.toml --dataset empty.jsonl", 2, "empty.jsonl: holds no conversation"),
    "a bad first line": ("train --config run.toml --dataset bad.jsonl", 2, "bad.jsonl:1"),
    "no such model": ("train --config run.toml", 2, "[job] model = './model': no such folder"),
    "nothing to validate": ("validate", 2, "name DATA or --config"),
    "top-p at temperature 0": ("generate a/b --top-p 0.9", 2, "no effect at temperature 0"),
    "no such target": ("generate nope", 2, "nope: no such folder"),
    "merge onto a full folder": ("merge nope full", 2, "full: already holds files"),
    "export onto a full folder": ("export nope full", 2, "full: already holds files"),
    "merge of no adapter": ("merge nope out", 2, "nope: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIGHT)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(case, folder):
    arguments, code, words = LIGHT[case]
    ended, said, modules = imported(*arguments.split(), cwd=folder)
    assert (ended, words in said) == (code, True), said
    assert "pydantic" in modules
    assert not modules & set(HEAVY)


def test_validate_without_a_tokenizer_imports_no_torch(folder):
    ended, said, modules = imported("validate", "data.jsonl", cwd=folder)
    assert ended == 0, said
    assert "rich" in modules
    assert not {"torch", "transformers", "megatron"} & modules


# --- init ---


def test_the_minimal_file_is_what_init_writes():
    text = (CONFIGS / "minimal.toml").read_text()
    assert text == run_file("configs/minimal.toml", "Qwen/Qwen3-Coder-30B-A3B-Instruct", 4, "conversations.jsonl")
    assert len(text.splitlines()) == 10
    config = load_config(CONFIGS / "minimal.toml")
    assert (config.world_size(), config.data.topology.expert_parallel) == (4, 2)
    assert config.training.validation.enabled


@pytest.mark.parametrize(("gpus", "experts"), [(1, 1), (2, 2), (3, 1), (8, 2)])
def test_init_writes_a_file_that_fits_the_gpus(tmp_path, gpus, experts):
    write_run_file(tmp_path / "new" / "run.toml", 'a "quoted" model', gpus, "däta.jsonl")
    config = load_config(tmp_path / "new" / "run.toml")
    assert (config.job.model, config.job.data) == ('a "quoted" model', "däta.jsonl")
    assert (config.world_size(), config.data.topology.expert_parallel) == (gpus, experts)


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "run.toml").write_text("mine")
    with pytest.raises(UserError, match=r"run\.toml: exists already"):
        write_run_file(tmp_path / "run.toml", "a/b", 1, "d.jsonl")
    assert (tmp_path / "run.toml").read_text() == "mine"
    with pytest.raises(UserError, match=r"ends in \.toml"):
        write_run_file(tmp_path / "run.json", "a/b", 1, "d.jsonl")
