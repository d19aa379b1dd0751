"""The cost of the data pipeline, one command per figure:

    python benchmarks/data.py tokenize DATASET MODEL      conversations per second on one core
    python benchmarks/data.py packing [--dataset DATASET --model MODEL --sequence-length N]
    python benchmarks/data.py loader                      seconds that a step waits for its batch
    python benchmarks/data.py large MODEL [--lines N]     memory to tokenize a large file, and time to reopen it

MODEL is a folder with a tokenizer, DATASET a conversation file or a folder of them.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

ROW, MEDIAN, SIGMA = 4096, 600, 1.0  # tokens per row; median and sigma of log-normal conversation lengths

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command(name="tokenize")
def tokenize_(dataset: Path, model: Path, most: int = 20_000) -> None:
    """Parse, check, render, tokenize and mask conversations in this process, with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizing processes do not import torch
    from megasft.data.records import conversation_files, read_blocks
    from megasft.data.tokenize import Recipe, tokenize_block
    from megasft.data.tokenizer import load_tokenizer

    tokenizer, recipe = load_tokenizer(model), Recipe(ROW)
    blocks = ((str(file), block) for file in conversation_files(dataset) for block in read_blocks(file))
    conversations = tokens = 0
    tokenize_block(next(blocks), tokenizer, recipe)  # warm
    started = time.process_time()
    for block in blocks:
        result = tokenize_block(block, tokenizer, recipe)
        conversations, tokens = (
            conversations + sum(result.counts.values()) - result.counts["samples"],
            tokens + len(result.ids),
        )
        if conversations >= most:
            break
    seconds = time.process_time() - started
    print(f"{conversations:,} conversations of {tokens / conversations:,.0f} tokens in {seconds:.1f} s of CPU time: "
          f"{conversations / seconds:,.0f} conversations/s, {tokens / seconds:,.0f} tokens/s on one core")  # fmt: skip


@app.command()
def packing(
    samples: int = 2_000_000, dataset: Path | None = None, model: Path | None = None, sequence_length: int = ROW
) -> None:
    """How full packed rows are, for log-normal lengths or a dataset, and how long packing an epoch takes."""
    from megasft.data.dataset import Batches

    if dataset and model:
        lengths = _lengths(dataset, model, sequence_length)
    else:
        lengths = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN), SIGMA, samples)).astype(np.int64)
        lengths = lengths.clip(2, sequence_length)
    batches = Batches(len(lengths), 128, 0, lengths=lengths, row_length=sequence_length)
    started = time.process_time()
    rows = batches.epoch(0)
    seconds = time.process_time() - started
    fill = lengths.sum() / len(rows) / sequence_length
    print(f"{len(lengths):,} samples (median {np.median(lengths):,.0f} tokens) in {len(rows):,} rows of "
          f"{sequence_length:,}: {fill:.2%} full, packed in {seconds:.2f} s of CPU time")  # fmt: skip


@app.command()
def loader(steps: int = 50, step_seconds: float = 0.1, global_batch: int = 64, packed: bool = True) -> None:
    """Seconds that a step waits for its batch with the loader's prefetching, and seconds to prepare one without it."""
    import torch

    from megasft.data.dataset import Batches, Mix, Samples
    from megasft.data.loader import Loader
    from megasft.data.micro_batches import MicroBatches

    count = steps * global_batch * (6 if packed else 1)
    lengths = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN), SIGMA, count)).astype(np.int64).clip(2, ROW)
    ends = torch.from_numpy(lengths.cumsum())
    mask = torch.ones(int(ends[-1]), dtype=torch.bool)
    mix = Mix.of(Samples(torch.randint(0, 150_000, mask.shape, dtype=torch.int32), mask, ends))
    batches = Batches.over(mix, global_batch, 0, ROW if packed else None)
    sizes = types.SimpleNamespace(data=1, tensor=1)
    topology = types.SimpleNamespace(
        sizes=sizes, groups=types.SimpleNamespace(dp=types.SimpleNamespace(rank=lambda: 0))
    )

    def make(rows: Sequence) -> list:
        return list(MicroBatches(mix, rows, 1, topology, torch.device("cpu")))  # type: ignore[arg-type]

    batches.epoch(0)
    started = time.perf_counter()
    for step in range(10):
        make(batches.rows(*batches.place(step)))
    alone = (time.perf_counter() - started) / 10
    ahead = Loader(mix, batches, make)
    next(ahead)
    waits, tokens = [], 0
    for _ in range(min(steps, batches.steps_in(0)) - 1):
        time.sleep(step_seconds)
        batch = next(ahead)
        waits.append(batch.waited)
        tokens += batch.tokens
    print(
        f"{tokens / len(waits):,.0f} tokens a step: {alone * 1e3:.1f} ms to prepare; a step of "
        f"{step_seconds * 1e3:.0f} ms waited {np.mean(waits) * 1e3:.2f} ms, at most {max(waits) * 1e3:.2f}"
    )


@app.command()
def large(
    model: Path,
    lines: int = 2_000_000,
    folder: Annotated[Path | None, typer.Option(help="for the file and the cache, by default a temporary one")] = None,
) -> None:
    """Tokenize a file of `lines` short conversations, then reopen it, each in a separate process."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        file = Path(own, "large.jsonl")
        _write_conversations(file, lines)
        print(f"{lines:,} lines, {file.stat().st_size / 2**20:,.0f} MiB")
        for step in ("tokenized", "reopened"):
            started = time.perf_counter()
            command = [sys.executable, __file__, "open", str(file), str(model), str(Path(own, "cache"))]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            peak = _peak_of_tree(child)
            result = json.loads(child.communicate()[0].splitlines()[-1])
            assert child.returncode == 0
            seconds = time.perf_counter() - started
            print(f"{step}: {result['samples']:,} samples, {result['tokens']:,} tokens "
                  f"in {result['open_seconds']:.2f} s "
                  f"({seconds:,.0f} s with imports, tokenizer and {result['pack_seconds']:.1f} s of packing); "
                  f"peak memory of all its processes {peak / 2**20:,.0f} MiB")  # fmt: skip


@app.command(name="open", hidden=True)
def open_(file: Path, model: Path, cache_dir: Path) -> None:
    """One rank's work on a file: tokenize it or open its cache, pack an epoch, read a batch."""
    from megasft.data.dataset import Batches, Mix, Samples
    from megasft.data.token_cache import prepare
    from megasft.data.tokenize import Recipe
    from megasft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    started = time.perf_counter()
    mix = Mix.of(Samples.open(prepare(file, tokenizer, Recipe(ROW), cache_dir=cache_dir)))
    opened = time.perf_counter()
    numbers = Batches.over(mix, 128, 0, ROW)[0]
    packed = time.perf_counter()
    assert all(len(mix[int(number)][0]) > 1 for number in numbers)
    tokens = int(mix.sources[0].ends[-1])
    print(json.dumps({"samples": len(mix), "tokens": tokens, "open_seconds": opened - started,
                      "pack_seconds": packed - opened}))  # fmt: skip


def _lengths(dataset: Path, model: Path, sequence_length: int) -> np.ndarray:
    from megasft.data.dataset import Samples
    from megasft.data.token_cache import prepare
    from megasft.data.tokenize import Recipe
    from megasft.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as cache:
        folder = prepare(dataset, load_tokenizer(model), Recipe(sequence_length), cache_dir=cache)
        return Samples.open(folder).lengths


def _write_conversations(file: Path, lines: int) -> None:
    chance = random.Random(0)
    words = ["the", "model", "answers", "a", "question", "about", "weather", "numbers", "code", "and", "some", "more"]
    with file.open("w") as stream:
        for i in range(lines):
            text = " ".join(chance.choices(words, k=chance.randint(3, 30)))
            record = [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": text}]
            stream.write(json.dumps({"messages": record}) + "\n")


def _peak_of_tree(child: subprocess.Popen) -> int:
    """Peak memory of a process and its children together, in bytes, sampled every 0.2 s.

    Memory is the proportional set size, including pages of mapped files.
    """
    peak = 0
    while child.poll() is None:
        total = 0
        for process in [child.pid, *_children(child.pid)]:
            try:
                rollup = dict(
                    line.split(":") for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
                )
            except (OSError, ValueError):
                continue
            total += sum(int(rollup[part].split()[0]) * 1024 for part in ("Pss_Anon", "Pss_Shmem", "Pss_File"))
        peak = max(peak, total)
        time.sleep(0.2)
    return peak


def _children(process: int) -> list[int]:
    try:
        direct = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return [*direct, *itertools.chain.from_iterable(map(_children, direct))]


if __name__ == "__main__":
    app()
