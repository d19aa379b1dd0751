"""The validation report and the coloured view of what is learned."""

import io
import json
import re

import pytest
from rich.console import Console

from megasft.data.tokenize import Recipe
from megasft.data.validate import print_report, show, validate_dataset
from megasft.messages import UserError


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def dataset(tmp_path):
    """Write records (objects, or raw lines) to a file."""

    def write(*records):
        file = tmp_path / "[red]data.jsonl"
        file.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records))
        return file

    return write


def printed(action, **settings):
    console = Console(file=io.StringIO(), width=200, **settings)
    result = action(console)
    return console.file.getvalue(), result


def test_a_clean_dataset_is_counted(dataset, with_template):
    tokenizer = with_template("chatml")
    report = validate_dataset(dataset(chat("a", "b"), chat("a", "c d e f"), chat("a", "b")), tokenizer, Recipe(14))
    assert (report.conversations, report.turns, report.duplicates, report.problems.total) == (3, 6, 1, 0)
    lengths = sorted(report.lengths)
    assert lengths[0] == lengths[1] < lengths[2]
    assert report.over_length == sum(length > 14 for length in lengths)
    assert report.supervised_tokens == 2 * 2 + lengths[2] - lengths[0] + 2
    text, code = printed(lambda console: print_report(report, console))
    assert code == 0
    rows = dict(re.findall(r"^│ (\S.*?) +│ +(\S.*?) │$", text, re.MULTILINE))
    assert (rows["conversations"], rows["turns"], rows["duplicates"], rows["problems"]) == ("3", "6", "1", "0")
    short, _, long = lengths
    p95 = round(short + 0.9 * (long - short))  # of three numbers, the second of which is the first
    assert rows["tokens"] == f"{2 * short + long}"
    assert rows["tokens: min, median, p95, max"] == f"{short}, {short}, {p95}, {long}"
    assert rows["supervised"] == f"{report.supervised_tokens / (2 * short + long):.1%}"
    assert rows["over-length (> 14)"] == f"{report.over_length}"
    assert "[red]data.jsonl" in text


def test_problems_are_shown_with_their_place_and_make_it_fail(dataset, with_template):
    broken = [b"{broken \x1b[2J [bold]"] * 30
    nothing = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]}
    report = validate_dataset(dataset(chat("a", "b"), nothing, *broken), with_template("chatml"), Recipe(100))
    text, code = printed(lambda console: print_report(report, console), force_terminal=True)
    assert code == 1
    assert report.problems.total == 31
    assert "data.jsonl:2: nothing to learn from" in text
    assert "data.jsonl:21: not JSON" in text
    assert "data.jsonl:22" not in text
    assert "and 11 more" in text
    assert "\x1b[2J" not in text
    assert "[bold]" in text


def test_problems_of_the_template_count_too(dataset, with_template):
    report = validate_dataset(
        dataset(*[chat("a", "b")] * 300), with_template("{{ raise_exception('no') }}"), Recipe(100)
    )
    assert (report.conversations, report.problems.total) == (0, 300)


def test_without_a_tokenizer_only_the_conversations_are_checked(dataset):
    report = validate_dataset(dataset(chat("a", "b"), b"{"), None, Recipe(100))
    text, code = printed(lambda console: print_report(report, console))
    assert (report.conversations, report.problems.total, code) == (1, 1, 1)
    assert "median" not in text


def test_a_missing_dataset_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        validate_dataset(tmp_path / "missing.jsonl", None, Recipe(100))


def test_supervised_tokens_are_coloured(dataset, with_template):
    file = dataset(chat("question", "the answer"), chat("next", "one"), b"{")
    tokenizer = with_template("chatml")
    text, _ = printed(lambda console: show(file, tokenizer, 1, Recipe(100), console), force_terminal=True)
    coloured = text.split("\x1b[30;42m")[1].split("\x1b[0m")[0]
    assert coloured == "the answer<|im_end|>"
    assert "next" not in text
    text, _ = printed(lambda console: show(file, tokenizer, 5, Recipe(100), console))
    assert "⟦the answer<|im_end|>⟧" in text
    assert "⟦one<|im_end|>⟧" in text
    assert ":3: not JSON" in text


def test_shown_conversations_cannot_command_the_terminal(dataset, with_template):
    evil = "\x1b]0;owned\x07 \x1b[2J \r \x9b31m \u202e [red]not markup[/red] [link=x]"
    file = dataset(chat(evil, evil))
    for terminal in (True, False):
        text, _ = printed(
            lambda console: show(file, with_template("chatml"), 1, Recipe(1000), console),
            force_terminal=terminal,
            color_system="standard" if terminal else None,
        )
        for bad in ("\x1b]", "\x1b[2J", "\x07", "\r", "\x9b", "\u202e"):
            assert bad not in text
        assert "[red]not markup[/red] [link=x]" in text
        assert "\\x1b]0;owned\\x07" in text


def test_what_truncation_takes_is_counted_and_what_is_shown_is_what_a_run_gets(dataset, with_template):
    tokenizer = with_template("chatml")
    file = dataset(chat("q", "one two three four five six seven"), chat("q", "one"), chat("q " * 40, "never seen"))
    recipe = Recipe(16)
    report = validate_dataset(file, tokenizer, recipe)
    begin = len(tokenizer.hf.encode("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"))
    targets = [
        len(tokenizer.hf.encode(f"{said}<|im_end|>")) for said in ("one two three four five six seven", "never seen")
    ]
    assert begin < 16 < begin + targets[0]
    assert report.fitted["targets cut"] == begin + targets[0] - 16 + targets[1]
    assert report.fitted["emptied"] == 1
    text, code = printed(lambda console: print_report(report, console))
    assert code == 0
    assert "1 truncated, 1 dropped" in text
    assert re.search(rf"supervised tokens cut +│ +{report.fitted['targets cut']} of {report.supervised_tokens}", text)
    assert re.search(r"with nothing left to learn from +│ +1 ", text)
    text, _ = printed(lambda console: show(file, tokenizer, 3, recipe, console))
    assert "seven" not in text
    assert "⟦one" in text
    assert "truncate_right leaves nothing to learn from" in text
    assert "never seen" not in text


def test_a_dataset_of_which_nothing_is_left_to_learn_from_fails_and_says_why(dataset, with_template):
    file = dataset(chat("q " * 40, "never seen"), chat("q " * 50, "nor this"))
    report = validate_dataset(file, with_template("chatml"), Recipe(16))
    text, code = printed(lambda console: print_report(report, console))
    assert code == 1
    assert "all 2 conversations are longer than [hyperparameters] sequence_length = 16" in text
    assert f"the longest has {max(report.lengths)} tokens" in text


def test_a_title_says_how_much_of_a_conversation_is_shown(dataset, with_template):
    file = dataset(chat("q", "one two three four five six seven"))
    whole, _ = printed(lambda console: show(file, with_template("chatml"), 1, Recipe(100), console))
    cut, _ = printed(lambda console: show(file, with_template("chatml"), 1, Recipe(16), console))
    tokens = re.search(r"data\.jsonl:1 \((\d+) tokens, (\d+) supervised\)", whole)
    assert tokens
    assert re.search(rf"data\.jsonl:1 \(16 tokens, \d+ supervised, cut from {tokens[1]} by truncate_right\)", cut)


def test_what_the_model_will_not_see_is_listed_with_count_and_line(dataset, with_template):
    first = chat("a", "b") | {"id": 7, "source": "x"}
    second = chat("c", "d") | {"source": "y"}
    second["messages"][0]["score"] = 0.5
    report = validate_dataset(dataset(chat("e", "f"), first, second), with_template("chatml"), Recipe(100))
    text, code = printed(lambda console: print_report(report, console))
    assert code == 0
    assert "ignored key `id`: 1 in 1 conversation (line 2)" in text
    assert "ignored key `source`: 2 in 2 conversations (line 2, 3)" in text
    assert "ignored key `messages[].score`: 1 in 1 conversation (line 3)" in text


def test_samples_beyond_the_models_positions_are_counted(dataset, with_template):
    report = validate_dataset(dataset(chat("a", "b"), chat("a", "b " * 30)), with_template("chatml"), Recipe(100), 30)
    text, code = printed(lambda console: print_report(report, console))
    assert (report.beyond, code) == (1, 0)
    assert "beyond the model's 30 positions" in text


def test_a_template_that_writes_the_date_is_named(dataset, with_template):
    file = dataset(chat("a", "b"))
    for template, named in (("dated", True), ("chatml", False)):
        report = validate_dataset(file, with_template(template), Recipe(100))
        text, _ = printed(lambda console, report=report: print_report(report, console))
        assert ("date in the chat template" in text) == named
