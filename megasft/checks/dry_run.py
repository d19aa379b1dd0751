"""`megasft train --dry-run`: all that can be known before ranks are launched, and the plan."""

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megasft import host
from megasft.checks import gpus, preflight
from megasft.config.schema import RunConfig
from megasft.data.conversations import Conversation, read_conversations
from megasft.data.problems import Problem
from megasft.data.records import conversation_files
from megasft.data.template import encode_many
from megasft.data.token_cache import default_cache_dir
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer import load_tokenizer
from megasft.messages import UserError, size
from megasft.model.hf_checkpoint import Checkpoint, untie_different_head
from megasft.model.hf_config import read_config
from megasft.model.hub import find_model
from megasft.model.shape import weights
from megasft.plan import report
from megasft.plan.advice import advice
from megasft.plan.devices import PER_NODE
from megasft.plan.plan import Plan, gpu_of, make_plan
from megasft.plan.remedies import known_gpu

FIRST = 16  # conversations of each data set that go through the chat template
TOKENS = 1.5  # bytes of the token cache for each byte of a conversation file: an id and a mark for some 4 characters


def dry_run(config: RunConfig, ranks: int) -> None:
    """Check what a launch on `ranks` ranks would check, and what it would meet later; print the plan.

    Raises UserError.
    """
    if "RANK" in os.environ:
        raise UserError("--dry-run launches no ranks; run it without torchrun")
    preflight.check(config, preflight.topology_sizes(config, ranks))
    preflight.check_gpus(config, max(1, ranks // config.compute.nodes))
    folder = find_model(config.job.model)
    hf_config, checkpoint = read_config(folder), Checkpoint(folder)
    untie_different_head(hf_config, checkpoint)
    checkpoint.check_all(hf_config)
    files = len(set(checkpoint.files.values()))
    print(f"weights: {len(checkpoint.specs):,} tensors in {files:,} files, as config.json says")
    for line in _conversations(config, folder):
        print(line)
    per_node = config.compute.gpu_count or PER_NODE
    gpu = known_gpu(host.own_gpu()[0]) if host.CUDA else gpu_of(config, None)
    plan = make_plan(config, hf_config, ranks, gpu, per_node)
    for line in _disks(config, plan):
        print(line)
    gpus.check_memory(config, hf_config, ranks)
    if not host.CUDA:
        print("devices: none here; the plan is not compared with free memory")
    print("\n".join(["", report.as_text(plan), *(f"advice: {line}" for line in advice(config, plan))]))


def _conversations(config: RunConfig, folder: Path) -> Iterator[str]:
    """The first conversations of each data set, through the template and the mask."""
    recipe = Recipe.of(config)
    tokenizer = load_tokenizer(folder, config.data.template_args, config.data.template_date)
    validation = config.data.validation_path if config.training.validation.enabled else None
    for path in [*(source.path for source in config.training_data()), *([validation] if validation else [])]:
        read = list(islice(read_conversations(path, recipe.ignore_keys), FIRST))
        good = [one for one in read if isinstance(one, Conversation)]
        made = encode_many(good, tokenizer, recipe.train_on, recipe.parse_special_in_text, recipe.lost_reasoning)
        problems = [one for one in [*read, *made] if isinstance(one, Problem)]
        if problems and config.data.on_error == "stop":
            raise UserError(str(problems[0]))
        encoded = [one for one in made if not isinstance(one, Problem)]
        supervised = sum(int(one.mask.sum()) for one in encoded)
        yield (
            f"{path}: the first {len(read)} conversations make {sum(map(len, encoded)):,} tokens, {supervised:,} "
            f"of them supervised{f'; {len(problems)} cannot be used' if problems else ''}"
        )


def _disks(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Space for the token cache, the quantized base and the checkpoints, on each disk. Raises UserError."""
    data = [source.path for source in config.training_data()]
    tokens = sum(file.stat().st_size for path in data for file in conversation_files(path))
    base = round(0.53 * weights(plan.job.shape)) if config.training.use_qlora else 0
    kept = config.checkpoint.keep + 2  # the best one, and the one that is written
    needs = [
        ("[data] cache_dir", Path(config.data.cache_dir or default_cache_dir()), round(TOKENS * tokens)),
        ("[quant] cache_dir", Path(config.quant.cache_dir or default_cache_dir()), base),
        ("[job] output_dir", Path(config.job.output_dir), kept * plan.checkpoint),
    ]
    used: dict[int, int] = {}
    for key, path, need in needs:
        wanted = path.expanduser().absolute()
        there = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
        device, free = os.stat(there).st_dev, shutil.disk_usage(there).free
        used[device] = used.get(device, 0) + need
        if used[device] > free:
            raise UserError(
                f"{key} {path}: some {size(used[device])} are needed on its disk, {size(free)} are free; free some, or "
                "name a folder on another disk"
            )
        if need:
            yield f"{key} {path}: takes some {size(need)}; {size(free)} are free"
