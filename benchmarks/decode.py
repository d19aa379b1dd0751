"""Answers to many prompts at once beside one at a time, both in one run: seconds, tokens per second and their ratio.

    python tools/make_demo.py --out demo      # once
    python benchmarks/decode.py [--ranks 1] [--model demo/model] [--prompts 32] [--tokens 64] [--repeat 5]

Prompts are those of the demo's validation conversations, without a token that stops, so that both sides make the same
number of tokens. Greedy, in fp32, in turns: both sides of a round share what the machine does meanwhile. The tokens of
both are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if not sys.warnoptions:
    warnings.simplefilter("ignore")

import torch

from megasft import host
from megasft.config.parallelism import TopologySettings, resolve_topology
from megasft.data.conversations import Conversation, read_conversations
from megasft.data.tokenizer import load_tokenizer
from megasft.distributed.topology import join_world
from megasft.generation.batch import generate_many
from megasft.generation.decode import generate
from megasft.generation.prompts import encode
from megasft.job import load_model


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--data", type=Path, default=Path("demo/data/validation.jsonl"))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if "RANK" not in os.environ and options.ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
        sys.exit(subprocess.run([*launcher, *sys.argv], check=False).returncode)
    if host.ranks_share_cores():
        torch.set_num_threads(1)
    sizes = TopologySettings(tensor_parallel=options.tensor_parallel, expert_tensor_parallel=options.tensor_parallel)
    topology = join_world(resolve_topology(sizes, options.ranks), seed=0)
    model = load_model(str(options.model), topology, torch.float32)
    prompts = _prompts(options.model, options.data, options.prompts)
    sides: dict[str, Callable[[], list[list[int]]]] = {
        "one at a time": lambda: [list(generate(model, prompt, options.tokens)) for prompt in prompts],
        "together": lambda: generate_many(model, prompts, options.tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    for _ in range(options.repeat + 1):  # the first round warms up
        for name, side in sides.items():
            started = time.perf_counter()
            answers[name] = side()
            seconds[name].append(time.perf_counter() - started)
    if topology.is_first:
        _print(seconds, answers, [len(prompt) for prompt in prompts])


def _prompts(model: Path, data: Path, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    found = [one for one in read_conversations(data) if isinstance(one, Conversation)][:count]
    return [encode(tokenizer, one.messages[:-1], one.tools, one.template_args) for one in found]


def _print(seconds: dict[str, list[float]], answers: dict[str, list[list[int]]], lengths: list[int]) -> None:
    one, together = answers.values()
    tokens = sum(map(len, one))
    same = sum(a == b for a, b in zip(one, together, strict=True))
    print(f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, {tokens:,} new tokens")
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<16}{median:8.2f} s {tokens / median:10,.0f} tokens/s (median of {len(seconds[name]) - 1})")
    print(f"{'ratio':<16}{medians['one at a time'] / medians['together']:8.1f}")
    print(f"answers with the same tokens: {same} of {len(lengths)}")


if __name__ == "__main__":
    main()
