"""Continue the adapter of a megasft run in TRL's GRPO, on a reward that a program can check.

    .venv-rl/bin/python examples/rl/grpo.py demo/model runs/demo/adapter demo/data/train.jsonl --out runs/demo-grpo

The last assistant message of each conversation whose prompt is short enough is the reference; the model answers that
prompt. Rewards: how much of the reference's text an answer has (0 to 1), and, where a conversation has tools, whether
the answer is a well-formed call of one of them (0 or 1). The result is a PEFT adapter, which `[job] init_adapter`
takes. It runs without megasft, in an environment of its own (requirements.txt).
"""

import json
import math
import os
import random
import re
import sys
import warnings
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import typer
from datasets import Dataset, disable_progress_bars
from jinja2 import TemplateError
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def main(
    model_dir: Annotated[Path, typer.Argument(help="folder of the base model, in transformers' format")],
    adapter_dir: Annotated[Path, typer.Argument(help="adapter_config.json and adapter_model.safetensors")],
    data: Annotated[Path, typer.Argument(help='a JSONL file of {"messages": [...], "tools": [...]}')],
    out: Annotated[Path, typer.Option(help="the folder to write the adapter to")],
    steps: Annotated[int, typer.Option(min=1, help="updates of the adapter")] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="prompts of a step")] = 2,
    group: Annotated[int, typer.Option(min=2, help="answers to each prompt")] = 6,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="of a prompt; longer ones are not asked")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 32,
    learning_rate: Annotated[float, typer.Option(help="constant, without warm-up")] = 1e-3,
    beta: Annotated[float, typer.Option(min=0, help="weight of the KL divergence from the adapter given")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the prompts' order and of the answers")] = 0,
    separate: Annotated[bool, typer.Option(help="keep gate and up apart; without, their r doubles")] = True,
) -> None:  # fmt: skip
    """Train a few steps of GRPO and print the rewards."""
    check_adapter(adapter_dir)
    if not (model_dir / "config.json").is_file():
        stop(f"{model_dir}: holds no config.json; name the folder of the base model")
    if out.exists() and any(out.iterdir()):
        stop(f"{out}: holds files already; name another folder")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = read_examples(tokenizer, data, max_prompt_tokens)
    random.Random(seed).shuffle(examples)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, str(adapter_dir), is_trainable=True)
    if separate:
        keep_gate_and_up_apart(policy)
    before = factors(policy)
    trainer = GRPOTrainer(
        policy,
        reward_funcs=[agreement, well_formed_call],
        args=GRPOConfig(
            output_dir=str(out), save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, seed=seed,
            max_steps=steps, per_device_train_batch_size=prompts * group, num_generations=group,
            max_completion_length=max_new_tokens, temperature=1.0, learning_rate=learning_rate, beta=beta,
            lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    report(trainer.state.log_history, before, factors(policy))
    # `save_model` would save "ref" too, which TRL adds for beta.
    policy.save_pretrained(out, selected_adapters=["default"])
    print(f"{out}: the adapter\nto continue in megasft: {settings(policy, out)}")


def agreement(completions: list[str], reference: list[str], **_: Any) -> list[float]:
    """The share of the reference's text that an answer has, and of the answer's text that the reference has."""
    pairs = zip(completions, reference, strict=True)
    return [SequenceMatcher(None, answer.strip(), wanted.strip(), autojunk=False).ratio() for answer, wanted in pairs]


def well_formed_call(completions: list[str], tools: list[list[str]], **_: Any) -> list[float | None]:
    """1 for an answer that calls a tool by its name with an object of arguments; None where there are no tools."""
    pairs = zip(completions, tools, strict=True)
    return [float(calls_one_of(answer, names)) if names else None for answer, names in pairs]


def calls_one_of(answer: str, names: list[str]) -> bool:
    """Whether the answer holds calls in Qwen3's format, all of them well-formed."""
    calls = []
    for text in TOOL_CALL.findall(answer):
        try:
            calls.append(json.loads(text))
        except ValueError:
            return False
    return bool(calls) and all(
        isinstance(call, dict) and call.get("name") in names and isinstance(call.get("arguments"), dict)
        for call in calls
    )


def read_examples(tokenizer: PreTrainedTokenizerBase, data: Path, longest: int) -> list[dict[str, Any]]:
    """Prompts as text, as the model was trained on them, each with the text of its reference and the tools' names."""
    try:
        lines = data.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        stop(f"{data}: cannot be read ({error.strerror})")
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            example = last_short_prompt(tokenizer, record["messages"], record.get("tools"), longest)
        except (ValueError, TypeError, KeyError, AttributeError, TemplateError) as error:
            stop(f'{data}:{number}: not a conversation as {{"messages": [...]}} ({type(error).__name__}: {error})')
        if example is not None:
            examples.append(example)
    if not examples:
        stop(f"{data}: no answer of the assistant has a prompt of at most {longest} tokens; raise --max-prompt-tokens")
    return examples


def last_short_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, longest: int
) -> dict[str, Any] | None:
    """The last prompt of a conversation that has at most `longest` tokens and an answer; None if there is none."""
    for end in reversed(range(len(messages))):
        if messages[end]["role"] != "assistant":
            continue
        prompt, complete = (
            str(tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=open_ended))
            for part, open_ended in ((messages[:end], True), (messages[: end + 1], False))
        )
        if len(tokenizer(prompt)["input_ids"]) <= longest and complete.startswith(prompt):
            reference = complete[len(prompt) :].split(tokenizer.eos_token)[0]
            names = [tool.get("function", tool)["name"] for tool in tools or []]
            return {"prompt": prompt, "reference": reference, "tools": names}
    return None


def check_adapter(folder: Path) -> None:
    """Stop at what peft would load as another policy than the one that was trained, or not at all."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            names = list(file.keys())
    except Exception as error:
        stop(f"{folder}: not a folder with a PEFT adapter ({error})")
    if config.get("use_rslora") and any(re.search(r"\.experts\.\d+\.", name) for name in names):
        stop(
            f"{folder}: peft scales gate and up of an adapter with use_rslora by sqrt(2) too much when it joins their "
            f"experts; `megasft export {folder} {folder}-plain` writes the same adapter without use_rslora"
        )


def keep_gate_and_up_apart(model: PeftModel) -> None:
    """Hold the zero blocks of B at zero, so that the adapter stays one of rank r for gate and one for up.

    Trained freely the blocks fill up, and gate and up share all 2 r rows of A.
    """
    for B in joined_factors(model):
        if is_block_diagonal(B):
            mask = torch.eye(2).view(2, 1, 2, 1).expand(blocks(B).shape).reshape(B.shape)
            B.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))


def joined_factors(model: PeftModel) -> list[torch.Tensor]:
    """The B of every layer in which peft joins the experts' gate and up to one adapter of rank 2 r."""
    r = model.peft_config["default"].r
    wrappers = (module for module in model.modules() if getattr(module, "parameter_name", "") == "gate_up_proj")
    return [wrapper.lora_B["default"].weight for wrapper in wrappers if wrapper.r["default"] == 2 * r]


def blocks(B: torch.Tensor) -> torch.Tensor:
    """B [2 F, 2 r * E], the experts innermost, as [gate or up, F, rows of A of gate or up, r * E]."""
    return B.detach().view(2, len(B) // 2, 2, -1)


def is_block_diagonal(B: torch.Tensor) -> bool:
    """Whether gate and up each use rows of A of their own."""
    parts = blocks(B)
    return not (parts[0, :, 1].any() or parts[1, :, 0].any())


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of all A and B that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}


def report(history: list[dict[str, Any]], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Print the steps, and how many tensors of the adapter they changed. Stop if that is none."""
    columns = {
        "step": "step", "reward": "reward", "agreement": "rewards/agreement/mean",
        "well-formed": "rewards/well_formed_call/mean", "spread": "reward_std", "gradient norm": "grad_norm",
        "KL": "kl", "tokens": "completions/mean_length",
    }  # fmt: skip
    table = Table()
    steps = [record for record in history if "reward" in record]
    shown = {title: key for title, key in columns.items() if any(record.get(key) is not None for record in steps)}
    for title in shown:
        table.add_column(title, justify="right")
    for record in steps:
        values = (record.get(key) for key in shown.values())
        table.add_row(*("" if value is None else f"{value:.4g}" for value in values))
    Console().print(table)
    moved = sum(not torch.equal(before[name], value) for name, value in after.items())
    print(f"{moved} of {len(after)} tensors of the adapter moved")
    if not moved:
        stop("all answers of each group got the same reward, so nothing was learned; raise --group or --max-new-tokens")


def settings(policy: PeftModel, out: Path) -> str:
    """The options with which `megasft train` continues the adapter."""
    config = policy.peft_config["default"]
    factor = 1 if all(map(is_block_diagonal, joined_factors(policy))) else 2
    root = math.sqrt(config.r) if config.use_rslora else 1  # megasft's scaling is alpha / r
    r, alpha = factor * config.r, factor * root * config.lora_alpha
    return f"--set job.init_adapter={out} --set lora.r={r} --set lora.alpha={alpha:g}"


def stop(line: str) -> Any:
    """Print one line and end with exit code 2."""
    print(f"grpo.py: {' '.join(line.split())}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    typer.run(main)
