"""Load a base model with transformers, an adapter with peft, and measure what the adapter does to the loss.

    python tools/check_adapter.py demo/model runs/demo/adapter demo/data/validation.jsonl --expect 2.71

An independent check of the trainer: one process, float32, without megasft's code. It finds the supervised tokens itself
(every assistant message and its `<|im_end|>`, in the rendered ChatML text). Exit code 1 if peft leaves a tensor of the
adapter unused, or if the loss is not the expected one.
"""

import json
import logging
import os
import re
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ["HF_HUB_OFFLINE"] = "1"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import, it warns about a kernel that is not needed here

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """A conversation: its tokens, and whether each is supervised."""

    ids: list[int]
    supervised: list[bool]


def main(
    model_dir: Annotated[Path, typer.Argument(exists=True, help="folder of the base model, in transformers' format")],
    adapter_dir: Annotated[Path, typer.Argument(exists=True, help="adapter_config.json and adapter_model.safetensors")],
    data: Annotated[Path, typer.Argument(exists=True, help='a JSONL file of {"messages": [...]}')],
    expect: Annotated[float | None, typer.Option(help="the expected loss with the adapter")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="expect the last validation loss of this run directory")] = None,
    tolerance: Annotated[float, typer.Option(help="largest relative difference from the expected loss")] = 0.01,
    sequence_length: Annotated[int, typer.Option(help="truncate conversations to this many tokens")] = 512,
    base: Annotated[bool, typer.Option(help="also measure the base model")] = True,
) -> None:
    """Print the mean loss over the assistant's tokens, with and without the adapter."""
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with data.open(encoding="utf-8") as lines:
        samples = [read_sample(tokenizer, line) for line in lines if line.strip()]
    cut = sum(len(sample.ids) > sequence_length for sample in samples)
    kept = [Sample(sample.ids[:sequence_length], sample.supervised[:sequence_length]) for sample in samples]
    tokens = sum(sum(sample.supervised) for sample in kept)
    console.print(f"{len(kept):,} conversations, {tokens:,} supervised tokens; {cut} truncated to {sequence_length}")

    model = Qwen3MoeForCausalLM.from_pretrained(model_dir, dtype=torch.float32, experts_implementation="grouped_mm")
    base_loss = mean_loss(model, kept, "base") if base else None
    if base_loss is not None:
        console.print(f"base loss     {base_loss:.4f}")

    adapted = PeftModel.from_pretrained(model, str(adapter_dir))
    console.print(f"adapter       {count_loaded(adapted, adapter_dir)} tensors, all loaded")
    loss = mean_loss(adapted, kept, "adapter")
    fall = f"  ({1 - loss / base_loss:.1%} below the base)" if base_loss is not None else ""
    console.print(f"adapter loss  {loss:.4f}{fall}")

    if run_dir is not None:
        expect = last_validation_loss(run_dir)
    if expect is not None:
        difference = abs(loss - expect) / expect
        within = difference <= tolerance
        console.print(
            f"expected      {expect:.4f}: {difference:.3%} apart, {'within' if within else 'MORE THAN'} {tolerance:.1%}"
        )
        if not within:
            raise typer.Exit(1)


def last_validation_loss(run_dir: Path) -> float:
    """The validation loss that the trainer measured at the end of its run."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "validation"][-1]


def read_sample(tokenizer: PreTrainedTokenizerBase, line: str) -> Sample:
    """Render and tokenize one conversation; tokens within an answer are supervised."""
    record = json.loads(line)
    text = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
    assert isinstance(text, str)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answers = [match.span(1) for match in ANSWER.finditer(text)]
    supervised = [
        any(start <= first and last <= end for start, end in answers) for first, last in encoding["offset_mapping"]
    ]
    return Sample(encoding["input_ids"], supervised)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, samples: list[Sample], name: str, tokens_per_batch: int = 4096) -> float:
    """Mean cross entropy in nats over the supervised tokens of all samples."""
    model.eval()
    total, count = 0.0, 0
    for batch in track(batches(samples, tokens_per_batch), f"loss of the {name}", transient=True):
        length = max(len(sample.ids) for sample in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        labels = torch.full((len(batch), length), -100)
        for row, sample in enumerate(batch):
            n = len(sample.ids)
            ids[row, :n] = torch.tensor(sample.ids)
            labels[row, :n] = torch.where(torch.tensor(sample.supervised), ids[row, :n], -100)
        # Padding is on the right, attention is causal and the router is per token, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def batches(samples: list[Sample], tokens_per_batch: int) -> list[list[Sample]]:
    """Batches of samples of similar length, with at most `tokens_per_batch` tokens including padding."""
    result: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if result and (len(result[-1]) + 1) * len(sample.ids) <= tokens_per_batch:
            result[-1].append(sample)
        else:
            result.append([sample])
    return result


def count_loaded(model: PeftModel, adapter_dir: Path) -> int:
    """The number of tensors in the adapter file, all of which must be in the model.

    peft warns about missing weights but not about surplus tensors, so check the report of `load_adapter`, then compare
    the values. peft stacks and concatenates the experts' tensors, so compare sums of squares of A and of B: one per
    linear layer outside the experts, and one for all experts of a layer.
    """
    report = model.load_adapter(str(adapter_dir), "default")
    if report.missing_keys or report.unexpected_keys:
        for kind, keys in (("missing in the file", report.missing_keys), ("not loaded", report.unexpected_keys)):
            for key in keys[:5]:
                print(f"{adapter_dir}: {kind}: {key}", file=sys.stderr)
        raise typer.Exit(1)

    in_file: dict[str, float] = defaultdict(float)
    in_model: dict[str, float] = defaultdict(float)
    with safe_open(adapter_dir / "adapter_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
        for key in keys:
            in_file[place(key)] += file.get_tensor(key).double().square().sum().item()
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            in_model[place(key)] += parameter.detach().double().square().sum().item()
    for where in sorted(in_file.keys() | in_model.keys()):
        if abs(in_file[where] - in_model[where]) > 1e-6 * max(in_file[where], 1e-12):
            print(f"{where}: the values in the file and in the model differ", file=sys.stderr)
            raise typer.Exit(1)
    return len(keys)


def place(key: str) -> str:
    """`...layers.3.mlp.experts.7.up_proj.lora_A.weight` -> `layers.3.mlp.experts.lora_A`; one name for all experts."""
    match = re.search(r"(layers\.\d+\.(?:mlp\.experts|[\w.]+?))(?:\.\d+\.\w+|\.base_layer)?\.(lora_[AB])", key)
    assert match, key
    return f"{match[1]}.{match[2]}"


if __name__ == "__main__":
    # peft gives both warnings for every Qwen3-MoE adapter: its pattern for experts names parameters, not modules, and
    # it uses a deprecated name of transformers.
    warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    typer.run(main)
