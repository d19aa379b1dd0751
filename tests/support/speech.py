"""What a job wrote to standard error, taken apart."""

import re

# Steps, and what the data came to.
PROGRESS = re.compile(r"step \d+/\d+: |\S+: [\d,]+ conversations, ")


def without_progress(said: str) -> str:
    """Everything but the reports of a job that is well."""
    return "".join(line for line in said.splitlines(keepends=True) if not PROGRESS.match(line))


def spoken(said: str) -> list[str]:
    """The lines in which megasft says why it ends."""
    return [line for line in said.splitlines() if line.startswith("megasft: ")]


def assert_one_line(said: str, words: list[str]) -> None:
    """One line and no other, a reason of megasft's with all of these words in it."""
    assert said.startswith("megasft: ")
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said
