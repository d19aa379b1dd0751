"""Files of any format and layout are read with their lines, and train the same tokens as when they are rewritten."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from megasft.data.conversations import read_conversations
from megasft.data.records import read_records
from megasft.data.template import encode_many
from tests.unit.records_by_format import RIGHT, assistant, call, system, turns, user

PAIRS = [{"question": f'é{i} {{["]}}\\', "answer": f"b{i}"} for i in range(700)]


def compress(text, suffix):
    return gzip.compress(text) if suffix == ".gz" else bytes(pyarrow.compress(text, codec="zstd")) if suffix else text


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "text", "first_lines"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, PAIRS)), [1, 2, 3]),
        ("a.jsonl", json.dumps(PAIRS, indent=2), [2, 6, 10]),
        ("a.jsonl", "\n".join(json.dumps(one, indent=1) for one in PAIRS), [1, 5, 9]),
        ("a.jsonl", "\ufeff\n" + json.dumps(PAIRS, ensure_ascii=False), [2, 2, 2]),
        ("a.json", json.dumps(PAIRS), [1, 1, 1]),
        ("a.json", "[\n" + ",\n".join(map(json.dumps, PAIRS)) + "\n]\n", [2, 3, 4]),
        ("a.json", "\n".join(map(json.dumps, PAIRS)), [1, 2, 3]),
    ],
)
def test_every_layout_of_json_gives_the_same_records_with_their_lines(
    tmp_path, monkeypatch, name, text, first_lines, suffix
):
    monkeypatch.setattr("megasft.data.json_text.CHUNK_BYTES", 1000)
    file = tmp_path / (name + suffix)
    file.write_bytes(compress(text.encode(), suffix))
    found = list(read_records(file))
    assert [record["messages"] for _, record, _ in found] == [
        [user(one["question"]), assistant(one["answer"])] for one in PAIRS
    ]
    assert [line for line, _, _ in found[:3]] == first_lines


def test_what_is_wrong_in_an_array_is_reported_where_it_stands(tmp_path):
    pair = '{"question": "a", "answer": "b"}'
    (tmp_path / "a.json").write_text(
        f'[\n{pair},\n{{"question"\n: x}},\n3,\n{pair} {pair},\n{pair},\n{{"question": "cut'
    )
    found = list(read_records(tmp_path / "a.json"))
    assert [(line, record if isinstance(record, str) else "") for line, record, _ in found] == [
        (2, ""),
        (3, "not JSON (Expecting value, line 2 of the record, column 3)"),
        (5, "not an object"),
        (6, "not JSON (Extra data, column 34)"),
        (7, ""),
        (8, "the array has no end: the file is damaged or cut short"),
    ]
    (tmp_path / "b.json").write_text(f"[{pair}]\n\n[{pair}]")
    assert [(line, type(record)) for line, record, _ in read_records(tmp_path / "b.json")] == [(1, dict), (3, str)]


def test_a_record_of_an_array_that_is_too_long_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("megasft.data.json_text.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("megasft.data.json_text.CHUNK_BYTES", 500)
    pair = {"question": "a", "answer": "b"}
    (tmp_path / "a.json").write_text(json.dumps([pair, pair | {"answer": "x" * 5000}, pair], indent=1))
    good, bad = read_records(tmp_path / "a.json")
    assert isinstance(good[1], dict)
    assert bad[0] == 6
    assert "longer than" in bad[1]


def test_parquet_files_of_other_formats_are_read_with_all_their_columns(tmp_path):
    rows = [
        {
            "conversations": turns(("human", "a"), ("gpt", f"b{i}"))["conversations"],
            "system": None if i else "s",
            "id": i,
        }
        for i in range(40)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [record for _, record, _ in read_records(tmp_path / "a.parquet")]
    assert found[0] == {"messages": [system("s"), user("a"), assistant("b0")], "id": 0}
    assert found[39] == {"messages": [user("a"), assistant("b39")], "id": 39}


def test_a_row_of_parquet_has_no_key_that_only_other_rows_have(tmp_path):
    calls = [call("f", {"a": None}), {"type": "function", "id": "1"}]
    rows = [{"messages": [user("a"), assistant("b", name="x")]}, {"messages": [assistant("b") | {"tool_calls": calls}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = (record for _, record, _ in read_records(tmp_path / "a.parquet"))
    assert first == rows[0]
    calls[0]["function"]["arguments"] = {}
    assert second == rows[1]


def test_a_row_of_parquet_that_is_not_utf_8_is_reported(tmp_path):
    notes = pyarrow.array([b"fine", b"\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"messages": [[user("a"), assistant("b")]] * 3, "note": notes})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = list(read_records(tmp_path / "a.parquet"))
    assert [(line, record if isinstance(record, str) else "") for line, record, _ in found] == [
        (1, ""), (2, "not UTF-8"), (3, "")
    ]  # fmt: skip


def test_what_lies_beside_the_data_of_a_folder_is_not_read(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "a.json").write_text(json.dumps(PAIRS[:2]))
    assert len(list(read_conversations(tmp_path))) == 2


def test_a_file_trains_the_same_tokens_before_and_after_it_is_rewritten(tmp_path, with_template):
    tokenizer = with_template("thinking")
    for name in (
        "sharegpt",
        "sharegpt, parallel calls and observations",
        "alpaca, history and system",
        "prompt and completion as messages",
        "messages as JSON text",
        "trace",
    ):
        record, right = RIGHT[name]
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        (tmp_path / "b.jsonl").write_text(json.dumps(right))
        one, other = encode_many(
            [*read_conversations(tmp_path / "a.jsonl"), *read_conversations(tmp_path / "b.jsonl")], tokenizer
        )
        assert one.mask.any()
        assert one.ids.tolist() == other.ids.tolist()
        assert one.mask.tolist() == other.mask.tolist()
