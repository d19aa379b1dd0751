"""What README and docs/ say: commands parse, keys and paths exist, links lead somewhere, quoted messages are in the code."""

import argparse
import ast
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from megasft.cli import app
from megasft.config.schema import RunConfig, load_config
from megasft.config.toml import parse_override
from megasft.messages import UserError
from tools import config_reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
EXTERNAL = {"vllm", "export", "source", "tensorboard"}  # commands of others, and of the shell


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each command in the pages' bash blocks, without the variables set before it."""
    for page, text in TEXTS.items():
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if ">" in words:
                    words = words[: words.index(">")]
                if words:
                    yield page, words


COMMANDS = list(commands())


def keys() -> set[str]:
    """`section.key` of every key of a run file, and of every section."""
    found = set()
    for name, section in config_reference.sections(RunConfig):
        path = name.strip("[]")
        found |= {path, *(f"{path}.{key}" for key in section.model_fields)}
    return found | {"tags"}


def test_the_pages_hold_commands_of_every_kind():
    assert len(COMMANDS) > 30
    assert {words[0] for _, words in COMMANDS} >= {"megasft", "torchrun", "make", "python", "uv"}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_a_command_in_the_pages_is_one_that_the_tool_takes(page, words, tmp_path):
    match words:
        case ["megasft", *arguments]:
            check_megasft(arguments, page, tmp_path)
        case ["torchrun", *arguments]:
            check_torchrun(arguments, page, tmp_path)
        case ["python", "-m", module, *arguments]:
            check_script(ROOT / f"{module.replace('.', '/')}.py", arguments)
        case ["python", path, *arguments]:
            check_script(ROOT / path, arguments)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip" | "uv", *arguments]:
            check_install(arguments)
        case ["sbatch", *options, script]:
            assert (ROOT / script).is_file()
            assert options[0::2] == ["--nodes"]
        case [path, *arguments] if path.startswith("tools/"):
            assert (ROOT / path).is_file()
            assert arguments
        case _:
            assert words[0] in EXTERNAL


def check_megasft(arguments: list[str], page: str, folder: Path) -> None:
    """Parse as the command line does, and check what is set in which run file: one of ours, or of `megasft init`."""
    parameters = parsed(arguments).params
    overrides = list(parameters.get("set_") or [])
    for override in overrides:
        assert ".".join(parse_override(override)[0]) in keys()
    if (config := parameters.get("config")) is not None:
        load_config(run_file(config, page, folder), overrides)


def run_file(config: Path, page: str, folder: Path) -> Path:
    """A run file of this repository, or one that a command on the same page writes."""
    if (ROOT / config).is_file():
        return ROOT / config
    makes = next(words for other, words in COMMANDS if other == page and words[1:3] == ["init", str(config)])
    done = megasft(makes[1:], folder)
    assert done.returncode == 0, done.stderr
    return folder / config


def megasft(arguments: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megasft", *arguments], cwd=folder, capture_output=True, text=True)


def parsed(arguments: list[str]) -> Any:
    group = typer.main.get_command(app)
    with group.make_context("megasft", list(arguments)) as context:
        if not (arguments and not arguments[0].startswith("-")):
            return context
        name, command, rest = group.resolve_command(context, list(arguments))
        return command.make_context(name, rest, parent=context)


INLINE = [
    (page, shlex.split(code))
    for page, text in TEXTS.items()
    for code in re.findall(
        r"`((?:megasft|python) [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )
]


def test_the_pages_hold_commands_within_sentences():
    assert len(INLINE) > 15


@pytest.mark.parametrize(("page", "words"), INLINE, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in INLINE])
def test_a_command_within_a_sentence_has_a_name_and_options_that_exist(page, words):
    """Such a command may leave out what is not its point."""
    match words:
        case ["megasft", name, *arguments]:
            command = typer.main.get_command(app).commands[name]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {argument for argument in arguments if argument.startswith("--")} <= known
        case ["python", "-m", module, *arguments]:
            check_script(ROOT / f"{module.replace('.', '/')}.py", arguments)
        case ["python", path, *arguments]:
            check_script(ROOT / path, arguments)


def check_torchrun(arguments: list[str], page: str, folder: Path) -> None:
    from torch.distributed.run import get_args_parser

    try:
        options = get_args_parser().parse_args(arguments)
    except SystemExit:
        raise AssertionError(f"torchrun refuses {arguments}") from None
    if options.module:
        assert options.training_script == "megasft"
        check_megasft(options.training_script_args, page, folder)
    else:
        assert options.training_script == "tools/train.py"
        check_megasft(["train", *options.training_script_args], page, folder)
        ranks = int(options.nproc_per_node) * int(options.nnodes.partition(":")[0])
        settings = parsed(["train", *options.training_script_args]).params
        assert load_config(ROOT / settings["config"], settings["set_"]).world_size() == ranks


def check_script(path: Path, arguments: list[str]) -> None:
    """Each option of a script is a parameter in its source; each subcommand a function."""
    source = path.read_text()
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            assert f'"--{name}"' in source or re.search(rf"\b{name.replace('-', '_')}: ", source), argument
    if arguments and re.search(r"@app\.command\(", source) and not arguments[0].startswith("-"):
        assert re.search(rf"^def {arguments[0]}_?\(|name=.{arguments[0]}.", source, re.MULTILINE), arguments[0]


def check_install(arguments: list[str]) -> None:
    """What is installed is this project with extras that it has, or packages for building; files named exist."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("verbs", nargs="*")
    parser.add_argument("-e", dest="editable")
    parser.add_argument("--constraint", type=Path)
    parser.add_argument("--no-build-isolation", action="store_true")
    options = parser.parse_args(arguments)
    assert options.constraint is None or (ROOT / options.constraint).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in [options.editable or "", *options.verbs]:
        if extra := re.search(r"\[(\w+)\]", package):
            assert extra[1] in extras


def test_the_pages_name_every_command():
    named = " ".join(TEXTS.values())
    group = typer.main.get_command(app)
    assert len(group.commands) >= 5
    assert [name for name in group.commands if not re.search(rf"`?megasft {name}\b", named)] == []


def test_the_configuration_page_is_what_the_schema_says():
    assert TEXTS["docs/configuration.md"] == config_reference.render(), "run: python tools/config_reference.py"


def test_every_key_has_a_meaning():
    bare = [
        f"{name} {key}"
        for name, section in config_reference.sections(RunConfig)
        for key in config_reference.keys(section)
        if not config_reference.meanings(section).get(key)
    ]
    assert bare == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_key_that_a_page_names_exists(page):
    block = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    text = block.sub(lambda found: found[2] if found[1] else "", TEXTS[page])  # without a language: what is printed
    known = keys()
    named = {f"{section}.{key}" for section, key in re.findall(r"\[([a-z.]+)\] ([a-z_]+)", text)}
    named |= set(re.findall(r"`\[+([a-z.]+)\]+`", text))
    named |= set(re.findall(r"--set '?([a-z_.]+)=", text))
    assert {key for key in named - {"section.key"} if key not in known and not key.startswith("tags.")} == set()


def test_every_toml_block_is_a_run_file():
    for text in TEXTS.values():
        for block in blocks(text, "toml"):
            RunConfig.from_dict(tomllib.loads(block))


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """GitHub's names of a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def of_this_repository(page: str) -> str:
    """The page without links to other places."""
    return re.sub(r"https://[^\s)]+", "", TEXTS[page])


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_that_a_page_names_exists(page):
    folders = "megasft|tests|tools|benchmarks|configs|docs|examples"
    for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", of_this_repository(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS)
def test_every_module_that_a_page_names_exists(page):
    """With its folder, as in "`data/records.py`", or without, as in "`megasft/config/schema.py`, `toml.py`"."""
    modules = [f"/{path.relative_to(ROOT)}" for path in ROOT.glob("[a-z]*/**/*.py")]
    for named in re.findall(r"[\w/]*\w\.py\b", of_this_repository(page).replace("../", "")):
        assert any(module.endswith(f"/{named}") for module in modules), named


def test_the_map_names_every_module():
    named = set(re.findall(r"[\w/]*\w\.py\b|megasft/[\w/]+/(?=`)", TEXTS["AGENTS.md"]))
    modules = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "megasft").rglob("[!_]*.py"))]
    assert len(modules) > 80
    missing = [
        module for module in modules
        if not any(f"/{module}".endswith(f"/{name}") or module.startswith(name) for name in named)
    ]  # fmt: skip
    assert missing == []


def test_the_page_on_gpus_lists_every_file_that_asks_for_cuda():
    asks = re.compile(r"host\.CUDA|^CUDA = |== \"cuda\"|, \"CUDA\"\)|import triton", re.MULTILINE)
    files = [path for path in (ROOT / "megasft").rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))]
    assert len(files) >= 5
    listed = TEXTS["docs/gpu.md"].partition("*Walked*")[0]
    assert [name for path in files if (name := path.relative_to(ROOT).as_posix()) not in listed] == []


def test_the_mistake_in_the_readme_is_refused_in_these_words(tmp_path, monkeypatch):
    said, line = re.search(r"^megasft: (configs/demo.toml:(\d+): .*)$", TEXTS["README.md"], re.MULTILINE).groups()
    lines = (ROOT / "configs" / "demo.toml").read_text().splitlines()
    lines[int(line) - 1] = lines[int(line) - 1].replace("learning_rate = 5e-3", "learning_rat = 5e-6")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_config("configs/demo.toml")
    assert str(refused.value) == said


@functools.cache
def messages() -> list[str]:
    """Every string of the package's code, with a null character where something is filled in."""
    found = []
    for path in sorted((ROOT / "megasft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """The messages that troubleshooting quotes, those of other libraries left out."""
    text = TEXTS["docs/troubleshooting.md"].partition("## From other libraries")[0]
    return [
        message
        for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", cell)
    ]


def test_troubleshooting_quotes_messages():
    assert len(quoted()) > 25


@pytest.mark.parametrize("message", quoted())
def test_a_message_that_troubleshooting_quotes_is_one_that_the_code_gives(message):
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"]])
def test_a_cheap_command_runs(arguments):
    done = megasft(arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
