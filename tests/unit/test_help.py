"""The command's help: complete, with nothing lost to markup, and with examples that are commands."""

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from megasft.cli import app

TOP = typer.main.get_command(app)


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    assert result.exit_code == 0
    return result.output


def unwrapped(text: str) -> str:
    """Without what a line break may have put into it or taken out of it."""
    return re.sub(r"\s+", "", text.replace("\b", ""))


def test_every_command_is_listed_with_what_it_does_and_the_version():
    text = shown()
    assert len(TOP.commands) >= 6
    for name, command in TOP.commands.items():
        first = re.split(r"(?<=[.:])\s", command.help, maxsplit=1)[0].rstrip(".:")
        assert re.search(rf"^ +{name} +\S", text, re.MULTILINE), name
        # The list has one line for each and ends a long one with dots.
        (line,) = re.findall(rf"^ +{name} +(\S.*)$", text, re.MULTILINE)
        assert first.startswith(line.removesuffix("...").rstrip(".: ")), name
    for words in (TOP.help, TOP.epilog or "", "--version"):
        assert unwrapped(words) in unwrapped(text)


@pytest.mark.parametrize("name", TOP.commands)
def test_each_option_and_argument_is_explained_and_no_word_of_it_is_lost(name):
    command, text = TOP.commands[name], unwrapped(shown(name))
    assert command.params
    for words in (command.help, command.epilog or ""):
        assert unwrapped(words) in text
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name} has no help"
        assert unwrapped(parameter.help) in text, parameter.name
        for option in parameter.opts if parameter.param_type_name == "option" else []:
            assert option in text, option


def examples() -> list[str]:
    """The commands in the examples, without what is said of them beside and where their output goes."""
    lines = [line for command in (TOP, *TOP.commands.values()) for line in (command.epilog or "").splitlines()]
    commands = [line.strip() for line in lines if re.match(r"megasft [a-z]|torchrun ", line.strip())]
    return [re.split(r"   | > ", command)[0] for command in commands]


def test_there_is_an_example_of_every_command():
    assert {shlex.split(line)[1] for line in examples() if line.startswith("megasft ")} == set(TOP.commands)


@pytest.mark.parametrize("line", examples())
def test_an_example_has_arguments_that_its_command_takes(line):
    words = shlex.split(line.partition("megasft ")[2])
    context = TOP.commands[words[0]].make_context(words[0], words[1:])  # raises where it takes them not
    given = " ".join(map(str, context.params.values()))
    for word in words[1:]:
        assert word.startswith("-") or word in given, word
