"""`megasft convert`: what it writes, what it says of it, and what it refuses."""

import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from megasft.data.conversations import read_conversations
from megasft.data.convert import Account, Hub, Places, convert, print_account
from megasft.data.token_cache import open_columns, prepare
from megasft.data.tokenize import Recipe
from megasft.messages import UserError

TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "grüß dich"}]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "grüß dich"}]
PAIR = {"question": "a", "answer": "b"}
STEP = {
    "dialogue": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": '{"city": "Päris"}'}]},
        {"role": "tool", "content": "mild"},
    ],
    "assistant": {"content": "", "tool_calls": [{"function": {"name": "say", "arguments": {"text": "mild"}}}]},
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "score": 1.0,
}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def run(tmp_path):
    """Convert lines; give the account, what was written, and the table."""

    def run(*records, **options):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
        account = convert(str(source), output, **options)
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        assert print_account(account, console) == account.exit_code
        written = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return account, written, console.export_text()

    return run


def test_every_record_is_written_or_counted_with_its_reason_and_lines(run, tmp_path):
    bad = {"conversations": [{"from": "narrator", "value": "x"}, *TURNS]}
    good = {"conversations": [{"from": "system", "value": ""}, *TURNS], "id": "1"}
    account, written, table = run(good, bad, "{", good, bad, bad, bad, {"conversations": TURNS[:1]})
    assert written == [{"messages": MESSAGES, "id": "1"}] * 2
    assert (account.read, account.written, account.exit_code) == (8, 2, 1)
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line.startswith("│")
    ]
    assert rows[0] == ["format", "1 file", "ShareGPT (`conversations`)", str(tmp_path / "in.jsonl")]
    assert ["read", "8", "", ""] in rows
    assert ["written", "2", "", ""] in rows
    assert ["changed", "2", "an empty system turn was left out", "lines 1, 4"] in rows
    assert ["kept", "2", "the key `id`, as it is", "lines 1, 4"] in rows
    refused = {row[2][:30]: (row[1], row[3]) for row in rows if row[0] == "refused"}
    assert refused == {
        "conversations[..]: `from` is '": ("4", "lines 2, 5, 6, ..."),
        "not JSON (Expecting property n": ("1", "line 3"),
        "nothing to learn from: no assi": ("1", "line 8"),
    }
    listed = account.refused_file.read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [
        f"{tmp_path / 'in.jsonl'}:{line}" for line in (2, 3, 5, 6, 7, 8)
    ]
    assert str(account.refused_file) in table


def test_a_good_file_leaves_no_list_of_refused_records_behind(run, tmp_path):
    assert run("{", PAIR)[0].exit_code == 1
    account, written, _ = run(PAIR)
    assert account.exit_code == 0
    assert written == [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_where_no_record_can_be_used_nothing_is_written(run, tmp_path):
    account, written, table = run({"conversations": TURNS[:1]})
    assert (account.exit_code, written) == (1, [])
    assert "out.jsonl was not written" in table
    assert run("")[0].refused["the file holds no conversation"].count == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_trace_becomes_a_conversation_with_structured_calls(run, tmp_path):
    account, written, _ = run(STEP)
    (conversation,) = read_conversations(tmp_path / "out.jsonl")
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2]["tool_calls"] == [call("weather", city="Päris")]
    assert conversation.messages[4]["tool_calls"] == [call("say", text="mild")]
    assert conversation.tools == STEP["tools"]
    assert conversation.supervised == (False, False, False, False, True)
    assert written[0]["score"] == 1.0
    assert account.exit_code == 0
    run(STEP, train_on="all")
    (conversation,) = read_conversations(tmp_path / "out.jsonl")
    assert conversation.supervised == (False, False, True, False, True)


def test_bad_traces_are_listed_by_line_and_the_others_written(run):
    bad_call = {**STEP, "assistant": {"content": "x", "tool_calls": [{"name": "f", "arguments": "{"}]}}
    bad_dialogue = {"dialogue": "x", "assistant": {}}
    account, written, _ = run("{", bad_dialogue, STEP, {**STEP, "assistant": None}, bad_call, STEP)
    assert len(written) == 2
    listed = account.refused_file.read_text().splitlines()
    expected = ((1, "not JSON"), (2, "`dialogue`"), (4, "`assistant`"), (5, "not JSON"))
    for line, (number, reason) in zip(listed, expected, strict=True):
        assert f"in.jsonl:{number}: " in line
        assert reason in line


def test_keys_are_left_out_where_that_is_asked_for_and_said(run):
    record = {"conversations": [TURNS[0], {**TURNS[1], "mood": "calm"}], "text": "hi", "id": 1}
    account, written, _ = run(record, drop=["text", "mood"])
    assert written == [{"messages": MESSAGES, "id": 1}]
    assert sorted(account.left_out) == ["`mood` (--drop)", "`text` (--drop)"]


def test_one_of_two_formats_can_be_named_and_the_other_is_counted_as_left_out(run):
    record = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "conversations": TURNS,
    }
    with pytest.raises(
        UserError, match=r"in\.jsonl:1: both `messages` and `conversations`.*--format messages, or sharegpt"
    ):
        run(record)
    account, written, _ = run(record, format="messages")
    assert written == [{"messages": record["messages"]}]
    assert list(account.left_out) == ["`conversations` (the key of another format)"]
    account, written, _ = run(record, format="sharegpt")
    assert written == [{"messages": MESSAGES}]
    assert list(account.left_out) == ["`messages` (another format was asked for)"]


def test_several_columns_that_could_be_meant_are_refused_with_a_remedy_that_works(run):
    record = {"context": "c", "question": "a", "answer": "b"}
    account, written, _ = run(record)
    assert written == []
    (reason,) = account.refused
    assert reason.endswith("name them: megasft convert IN OUT --format context+question/answer")
    _, written, _ = run(record, format="context+question/answer")
    assert written == [{"messages": [{"role": "user", "content": "c\na"}, {"role": "assistant", "content": "b"}]}]


def test_columns_that_json_has_no_form_for_are_left_out_and_said(tmp_path):
    rows = [{"conversations": TURNS, "at": datetime.datetime(2026, 1, 2), "score": float("nan"), "id": 7}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    account = convert(str(tmp_path / "a.parquet"), tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"messages": MESSAGES, "id": 7}
    assert sorted(account.left_out) == [
        "`at` (datetime: JSON has no form for it)", "`score` (float: JSON has no form for it)"
    ]  # fmt: skip


def test_a_folder_is_read_with_the_format_of_each_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps([PAIR, PAIR], indent=2))
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"conversations": TURNS}))
    account = convert(str(tmp_path / "in"), tmp_path / "out.jsonl")
    assert {title: places.count for title, places in account.formats.items()} == {
        "pairs of a prompt and its answer": 1, "ShareGPT (`conversations`)": 1
    }  # fmt: skip
    assert account.written == 3


def test_a_converted_file_trains_the_same_tokens_as_the_file_itself(run, tmp_path, with_template):
    records = [
        {"conversations": TURNS},
        {"conversations": [{"from": "system", "value": "s"}, *TURNS, *TURNS], "id": "x"},
    ]
    run(*records * 200)
    folders = [
        prepare(tmp_path / name, with_template("chatml"), Recipe(100), cache_dir=tmp_path)
        for name in ("in.jsonl", "out.jsonl")
    ]
    (ids, mask, ends, places), *other = [
        [column.tolist() for column in open_columns(folder).values()] for folder in folders
    ]
    assert other == [[ids, mask, ends, places]]
    assert folders[0] != folders[1]
    assert len(ends) == 400
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, r"in\.jsonl:1: preference data"),
        ({"text": "once"}, {}, r"in\.jsonl:1: plain text"),
        (
            {"a": 1, "b": 2},
            {},
            r"in\.jsonl:1: no format that megasft knows \(keys: `a`, `b`\); .* --format question/answer",
        ),
        (PAIR, {"format": "dpo"}, r"--format dpo: not known; give one of messages, sharegpt"),
        (PAIR, {"train_on": "some"}, r"--train-on some: give `all` or `last`"),
    ],
)
def test_what_cannot_be_converted_at_all_is_one_line(run, tmp_path, record, options, reason):
    with pytest.raises(UserError, match=reason) as refused:
        run(record, **options)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_output_cannot_be_an_input(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR))
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UserError, match="write to another file"):
            convert(str(source), tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"name a \.jsonl file"):
        convert(str(tmp_path), tmp_path / "b.txt")
    with pytest.raises(UserError, match="cannot be written"):
        convert(str(tmp_path), tmp_path / "missing" / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == json.dumps(PAIR)


def test_the_command_exits_with_1_where_records_were_refused_and_2_where_nothing_could_be_done(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n{")
    codes = {}
    for source in ("a.jsonl", "missing.jsonl"):
        command = [sys.executable, "-m", "megasft", "convert", source, "out.jsonl"]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
        )
        codes[source] = done.returncode
        assert "Traceback" not in done.stderr
    assert codes == {"a.jsonl": 1, "missing.jsonl": 2}
    assert done.stderr.startswith("megasft: missing.jsonl: no such file or folder; give a dataset of .jsonl")


def test_the_example_of_the_page_is_what_happens(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    given, _, written = re.findall(r"```(?:json)?\n(.*?)```", page[page.index("## Example") :], re.DOTALL)
    shown = page[page.index("chats.jsonl\n┌") : page.index("\n```\n\nThe last column")]
    monkeypatch.chdir(tmp_path)
    Path("chats.json").write_text(given)
    account = convert("chats.json", Path("chats.jsonl"))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_account(account, console)
    assert [line.rstrip() for line in console.export_text().splitlines()] == shown.splitlines()
    assert Path("chats.jsonl").read_text() == written


# --- the Hub ---------------------------------------------------------------------------------------------------------


# In a process of its own, whose libraries know from the start that there is no network. The folder is what `datasets`
# leaves in its cache when it has loaded `someone/chats`.
FROM_THE_HUB = """
import json, sys
from pathlib import Path
import datasets
from megasft.data.convert import Hub, convert
from megasft.messages import UserError

turns = json.loads(sys.argv[1])
made = datasets.Dataset.from_list([{"conversations": turns, "id": i} for i in range(300)])
folder = Path(datasets.config.HF_DATASETS_CACHE) / "someone___chats" / "default" / "0.0.0" / "0123456789abcdef"
folder.mkdir(parents=True)
with datasets.arrow_writer.ArrowWriter(features=made.features, path=str(folder / "chats-train.arrow")) as writer:
    for row in made:
        writer.write(row)
    examples, size = writer.finalize()
split = {"name": "train", "num_bytes": size, "num_examples": examples, "dataset_name": "chats"}
names = {"builder_name": "parquet", "dataset_name": "chats", "config_name": "default"}
datasets.DatasetInfo(features=made.features, splits=[split], **names).write_to_directory(str(folder))

print(convert("someone/chats", Path("out.jsonl")).written)
for hub in (Hub(split="test"), Hub(subset="other")):
    try:
        convert("someone/chats", Path("other.jsonl"), hub=hub)
    except UserError as error:
        print(error)
"""


def test_where_a_key_is_in_the_way_the_option_that_leaves_it_out_is_named(tmp_path):
    account = Account(tmp_path / "out.jsonl", read=2, written=1)
    account.refused["the key `x` is not known; pass over it with [data] ignore_keys = ['x']"] = Places(1, [("a", 1)])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_account(account, console)
    assert "left out here: --drop KEY" in console.export_text()


def test_a_dataset_of_the_hub_is_read_from_the_cache(tmp_path):
    if not importlib.util.find_spec("datasets"):
        pytest.skip("needs the extra `hub`")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FROM_THE_HUB, json.dumps(TURNS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    count, split, subset = done.stdout.splitlines()
    assert count == "300"
    cannot = "someone/chats: no such file or folder, and no dataset that can be loaded ("
    assert split == f"""{cannot}Unknown split "test". Should be one of ['train'].)"""
    assert subset.startswith(cannot)
    assert "other" in subset
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [{"messages": MESSAGES, "id": i} for i in range(300)]


def test_the_name_of_a_dataset_in_place_of_a_file_says_how_to_get_the_file():
    with pytest.raises(UserError, match=r"megasft convert someone/chats OUT\.jsonl$"):
        list(read_conversations("someone/chats"))


def test_a_misspelled_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "data").mkdir()
    for path in ("data/missing", "other/missing.json"):
        with pytest.raises(UserError, match=f"^{path}: no such file or folder; give a dataset of"):
            convert(path, tmp_path / "out.jsonl")


def test_without_datasets_the_line_that_installs_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"to read a dataset of the Hub: pip install 'megasft\[hub\]'"):
        convert("someone/chats", tmp_path / "out.jsonl", hub=Hub())
