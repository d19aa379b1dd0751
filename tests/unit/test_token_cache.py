"""Tokenized files in the cache: made once, found again, made anew when anything has changed, never half."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megasft.data import records, token_cache, tokenize
from megasft.data.conversations import read_conversations
from megasft.data.dataset import Samples
from megasft.data.overlong import fit
from megasft.data.template import encode_many
from megasft.data.token_cache import prepare
from megasft.data.tokenize import Recipe, tokenize_files
from megasft.messages import UserError
from megasft.storage import digests, disk_cache

RECIPE = Recipe(sequence_length=64)


def chat(i, answer="the answer"):
    text = f"{answer} {i} " + "and the weather in Paris " * (i % 7)
    return {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": text}]}


def write(file, count, *more):
    lines = [json.dumps(chat(i)) for i in range(count)]
    file.write_text("\n".join([*lines, *more]) + "\n")
    return file


@pytest.fixture
def tokenizer(with_template):
    return with_template("chatml")


@pytest.fixture
def load(tokenizer, tmp_path):
    def run(path, recipe=RECIPE, on_error="stop", workers=0, tokenizer=tokenizer):
        return Samples.open(prepare(path, tokenizer, recipe, on_error, tmp_path / "cache", workers))

    return run


@pytest.fixture
def built(monkeypatch):
    """The files of every dataset that was tokenized rather than found."""
    files = []

    def spy(chosen, *args):
        files.append([file.name for file in chosen])
        return tokenize_files(chosen, *args)

    monkeypatch.setattr(token_cache, "tokenize_files", spy)
    return files


def direct(path, tokenizer, recipe=RECIPE):
    """The same samples without processes, blocks or files."""
    encoded = encode_many(list(read_conversations(path)), tokenizer, recipe.train_on, recipe.parse_special_in_text)
    return Samples.of([piece for one in encoded for piece in fit(one, recipe.sequence_length, recipe.overlong)])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip((a.ids, a.mask, a.ends), (b.ids, b.mask, b.ends), strict=True))


def finished(folder):
    return [path for path in (folder / "cache").iterdir() if path.is_dir() and path.name != "digests"]


def test_samples_are_those_of_the_conversations_in_their_order(load, tokenizer, tmp_path):
    file = write(tmp_path / "data.jsonl", 700)
    samples = load(file)
    assert len(samples) == 700
    assert same(samples, direct(file, tokenizer))


def test_processes_give_the_same_samples_as_none(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "BLOCKS_WITHOUT_PROCESSES", 1)
    file = write(tmp_path / "data.jsonl", 1500, "{broken")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "a.jsonl", 900)
    (tmp_path / "folder" / "b.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    for path in (file, tmp_path / "folder"):
        alone = Samples.open(prepare(path, tokenizer, RECIPE, "skip", tmp_path / "one", workers=0))
        together = Samples.open(prepare(path, tokenizer, RECIPE, "skip", tmp_path / "two", workers=2))
        assert same(alone, together)


def test_a_second_run_finds_the_samples_and_copies_none(load, built, tmp_path):
    file = write(tmp_path / "data.jsonl", 50)
    first = load(file)
    second = load(file)
    assert built == [["data.jsonl"]]
    assert same(first, second)
    maps = Path("/proc/self/maps").read_text()
    assert all(str(finished(tmp_path)[0] / f"{name}.bin") in maps for name in ("ids", "mask", "ends"))


def test_a_copy_of_a_file_is_the_same_content(load, built, tmp_path):
    file = write(tmp_path / "data.jsonl", 50)
    load(file)
    load(file.rename(tmp_path / "moved.jsonl"))
    assert len(built) == 1


@pytest.mark.parametrize(
    "recipe",
    [Recipe(65), Recipe(64, train_on="last"), Recipe(64, overlong="drop"), Recipe(64, parse_special_in_text=True)],
    ids=["sequence_length", "train_on", "overlong", "parse_special_in_text"],
)
def test_other_settings_are_other_samples(load, built, tmp_path, recipe):
    file = write(tmp_path / "data.jsonl", 5)
    load(file)
    load(file, recipe)
    assert len(built) == 2


def test_another_template_or_tokenizer_is_other_samples(load, built, with_template, tmp_path):
    file = write(tmp_path / "data.jsonl", 5)
    first = load(file)
    second = load(file, tokenizer=with_template("header_ids"))
    assert len(built) == 2
    assert not same(first, second)


@pytest.mark.parametrize("settled", [True, False])
def test_a_changed_file_is_tokenized_again_though_size_and_time_stay(
    load, built, tokenizer, tmp_path, monkeypatch, settled
):
    monkeypatch.setattr(digests, "UNSETTLED_SECONDS", -1.0 if settled else 1e9)
    file = write(tmp_path / "data.jsonl", 5)
    load(file)
    assert len(list((tmp_path / "cache").glob("digests/*"))) == settled
    status = file.stat()
    time.sleep(0.05)  # clocks of file systems tick some hundred times a second
    file.write_bytes(file.read_bytes().replace(b"question 3", b"question 7"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert same(load(file), direct(file, tokenizer))
    assert len(built) == 2


def test_a_file_at_rest_is_not_read_again(load, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "UNSETTLED_SECONDS", -1.0)
    file = write(tmp_path / "data.jsonl", 5)
    load(file)
    monkeypatch.setattr(digests.hashlib, "file_digest", None)  # calling it would fail
    with pytest.raises(TypeError):
        load(write(tmp_path / "other.jsonl", 5))
    monkeypatch.undo()
    monkeypatch.setattr(token_cache, "tokenize_files", None)
    assert len(load(file)) == 5


def test_a_file_that_was_only_just_written_is_not_taken_for_settled(load, tmp_path):
    load(write(tmp_path / "data.jsonl", 5))
    assert not list((tmp_path / "cache").glob("digests/*"))


def test_a_file_that_grows_while_it_is_read_is_refused_and_nothing_is_kept(load, tmp_path, monkeypatch):
    file = write(tmp_path / "data.jsonl", 5)

    def writer(chosen, *args):
        for tokens in tokenize_files(chosen, *args):
            yield tokens
            write(file, 6)

    monkeypatch.setattr(token_cache, "tokenize_files", writer)
    with pytest.raises(UserError, match=r"data\.jsonl: changed while it was read"):
        load(file)
    monkeypatch.undo()
    assert len(load(file)) == 6


@pytest.mark.parametrize("name", ["ids.bin", "mask.bin", "ends.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_made_again(load, built, tokenizer, tmp_path, name, damage):
    file = write(tmp_path / "data.jsonl", 50)
    load(file)
    (folder,) = finished(tmp_path)
    if damage == "cut":
        os.truncate(folder / name, (folder / name).stat().st_size - 3)
    else:
        (folder / name).unlink()
    assert same(load(file), direct(file, tokenizer))
    assert len(built) == 2


def test_ends_that_are_others_than_were_written_are_noticed(load, built, tmp_path):
    file = write(tmp_path / "data.jsonl", 50)
    load(file)
    ends = np.fromfile(finished(tmp_path)[0] / "ends.bin", np.int64)
    ends[7] += 1
    ends.tofile(finished(tmp_path)[0] / "ends.bin")
    load(file)
    assert len(built) == 2


BAD = ["{broken", json.dumps({"messages": [{"role": "user", "content": "a"}]})]


def test_a_conversation_that_cannot_be_used_ends_the_run_with_its_place(load, tmp_path):
    for bad, more in ((BAD[:1], ""), (BAD, "1 more problem"), (BAD * 2, "3 more problems")):
        file = write(tmp_path / "data.jsonl", 3, *bad)
        for _ in range(2):  # from the cache as well
            with pytest.raises(UserError, match=r"data\.jsonl:4: not JSON") as refused:
                load(file)
            said = str(refused.value).partition(" (and ")[2]
            assert said == (f"{more}; `megasft validate` lists them)" if more else "")


def test_what_is_skipped_is_counted_and_named(load, built, tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", 3, *BAD, json.dumps(chat(3)))
    for _ in range(2):
        assert len(load(file, on_error="skip")) == 4
        said = capsys.readouterr().err
        assert "4 conversations, 4 samples" in said
        assert "skipped 2" in said
        assert "data.jsonl:4: not JSON" in said
        assert "data.jsonl:5: nothing to learn from" in said
        (listed,) = [line.split("listed in ")[1] for line in said.splitlines() if "listed in" in line]
        assert len(Path(listed).read_text().splitlines()) == 2
    with pytest.raises(UserError, match=":4: not JSON"):
        load(file)
    assert len(built) == 1


def test_the_skipped_of_a_moved_file_have_its_new_name(load, tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", 3, *BAD)
    load(file, on_error="skip")
    capsys.readouterr()
    load(file.rename(tmp_path / "moved.jsonl"), on_error="skip")
    assert "moved.jsonl:4: not JSON" in capsys.readouterr().err


def test_what_is_cut_is_counted(load, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(chat(i, "long " * 40 * (i % 2))) for i in range(6)))
    load(write(tmp_path / "short.jsonl", 3))
    assert "over-length" not in capsys.readouterr().err
    load(file, Recipe(64, overlong="truncate_right"))
    assert "over-length: 3 truncated (truncate_right)" in capsys.readouterr().err
    assert len(load(file, Recipe(64, overlong="drop"))) == 3
    assert "over-length: 3 dropped (drop)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n\n", BAD[1]])
def test_a_file_without_anything_to_learn_from_is_refused(load, tmp_path, content):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"holds no conversation|nothing to learn from"):
        load(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="no conversation with something to learn from"):
        load(tmp_path / "data.jsonl", on_error="skip")


def test_a_long_file_is_reported_on_the_way(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(token_cache, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(records, "BLOCK_RECORDS", 4)
    load(write(tmp_path / "data.jsonl", 12))
    said = re.findall(r"data\.jsonl: (\d+) samples tokenized \(([\d,]+) a second\)", capsys.readouterr().err)
    assert [int(count) for count, _ in said] == [4, 8, 12]
    assert all(int(rate.replace(",", "")) > 0 for _, rate in said)


def test_an_unwritable_cache_is_named(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"\[data\] cache_dir: .*file.* cannot be written \(Not a directory\)"):
        prepare(write(tmp_path / "data.jsonl", 3), tokenizer, RECIPE, cache_dir=tmp_path / "file" / "cache")


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.default_cache_dir() == tmp_path / ".cache" / "megasft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert disk_cache.default_cache_dir() == tmp_path / "x" / "megasft"


# Runs that build at once, and runs that are killed


BUILDER = """
import sys, time
from pathlib import Path
"""

BUILDER = """
import sys, time
from pathlib import Path
sys.modules["torch"] = None  # tokenizing needs none, and starts sooner without
from megasft.data import token_cache
from megasft.data.tokenize import Recipe, tokenize_files
from megasft.data.tokenizer import load_tokenizer

model, data, folder, seconds = sys.argv[1:]

def slowly(*args):
    Path(folder, f"started-{time.time_ns()}").touch()
    for tokens in tokenize_files(*args):
        yield tokens
        time.sleep(float(seconds))

token_cache.tokenize_files = slowly
print(token_cache.prepare(data, load_tokenizer(model), Recipe(64), "stop", Path(folder, "cache"), 0))
"""


def start_builder(tokenizer, data, folder, seconds):
    command = [sys.executable, "-c", BUILDER, tokenizer.source, str(data), str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_two_runs_that_need_the_same_samples_make_them_once(tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", 600)
    first = start_builder(tokenizer, data, tmp_path, 1.0)
    wait_for(lambda: list(tmp_path.glob("started-*")))
    second = start_builder(tokenizer, data, tmp_path, 1.0)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list(tmp_path.glob("started-*"))) == 1
    assert same(Samples.open(Path(outputs[1][0].strip())), direct(data, tokenizer))


def test_a_run_that_is_killed_halfway_leaves_nothing_that_is_taken_for_whole(load, built, tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", 600)
    builder = start_builder(tokenizer, data, tmp_path, 60)
    wait_for(lambda: list(tmp_path.glob("cache/*.part/ids.bin")))
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    other = write(tmp_path / "other.jsonl", 3)
    load(other)
    assert not list(tmp_path.glob("cache/*.part")), "whoever comes next clears up"
    assert same(load(data), direct(data, tokenizer))
    assert len(built) == 2


def test_a_run_that_waits_for_one_that_is_killed_goes_on_by_itself(tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", 600)
    first = start_builder(tokenizer, data, tmp_path, 60)
    wait_for(lambda: list(tmp_path.glob("cache/*.part/ids.bin")))
    second = start_builder(tokenizer, data, tmp_path, 0)
    assert any("another run tokenizes the same data" in line for line in second.stderr)
    first.kill()
    first.communicate()
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert same(Samples.open(Path(output.strip())), direct(data, tokenizer))


def test_a_tokenizing_process_that_dies_is_an_error_and_no_hang(load, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "BLOCKS_WITHOUT_PROCESSES", 1)
    start = tokenize._Worker.__init__

    def doomed(self):
        start(self)
        self.process.kill()

    monkeypatch.setattr(tokenize._Worker, "__init__", doomed)
    with pytest.raises(RuntimeError, match="a tokenizing process ended early"):
        load(write(tmp_path / "data.jsonl", 1000), workers=2)
    assert not finished(tmp_path) or all(path.suffix == ".part" for path in finished(tmp_path))
