"""The file of `--env-file` is read into the environment, and no key in it is shown."""

import os
import subprocess
import sys

import pytest

from megasft.config.keys import load_env_file, redact
from megasft.messages import UserError, say


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"SET": "before"})
    return os.environ


def test_lines_are_variables_and_those_that_are_set_stay(tmp_path, environment):
    (tmp_path / "keys.env").write_text(
        "# a comment\n\nPLAIN=abc\nexport EXPORTED = spaced \nQUOTED='a # b'\nDOUBLE=\"x=y\" # why\nEMPTY=\nHASH=a#b # c\nSET=after\n"
    )
    load_env_file(tmp_path / "keys.env")
    environment.pop("PYTEST_CURRENT_TEST", None)
    assert environment == {
        "SET": "before", "PLAIN": "abc", "EXPORTED": "spaced", "QUOTED": "a # b", "DOUBLE": "x=y", "EMPTY": "", "HASH": "a#b",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["hf_secret", "A-B=hf_secret", "A='hf_secret", 'A="hf_secret" more', "A=hf_secret\0"])
def test_a_line_that_is_no_variable_is_named_and_not_shown(tmp_path, environment, line):
    (tmp_path / "keys.env").write_text(f"A=1\n{line}\n")
    with pytest.raises(UserError, match=r"keys\.env:2: ") as caught:
        load_env_file(tmp_path / "keys.env")
    assert "hf_secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=words):
            load_env_file(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_env_file(tmp_path / "binary")


def test_keys_and_passwords_are_taken_out_of_text(environment, capsys):
    environment |= {
        "HF_TOKEN": "hf_abcdefgh",
        "MY_API_KEY": "hf_abcdefgh-longer",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/home/user",
    }
    text = "hf_abcdefgh hf_abcdefgh-longer false /home/user http://name:word@host:1/a?b x"
    assert redact(text) == "*** *** false /home/user http://***@host:1/a?b x"
    say("failed with hf_abcdefgh", "Traceback: hf_abcdefgh\n")
    assert capsys.readouterr().err == "Traceback: ***\nmegasft: failed with ***\n"


def test_the_command_refuses_what_is_no_file(tmp_path):
    run_file = tmp_path / "run.toml"
    run_file.write_text('[job]\nmodel = "x"\ndata = "y"\n')
    command = [sys.executable, "-m", "megasft", "train", "--config", str(run_file)]
    done = subprocess.run([*command, "--env-file", "nothing.env"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "megasft: --env-file nothing.env: cannot be read (No such file or directory)\n",
    )
