"""Make the demo's world without a network: games of Crafter as conversations, tokenizer, a small pretrained Qwen3-MoE.

    python tools/make_demo.py --out demo

The traces are of a script that plays Crafter (examples/crafter). The base model is pretrained for a minute or two on
the calls of players whose rules were drawn at random (examples/crafter/aimless.py): it reads and writes their language,
and plays badly. The same packages and seed make the same world.

    OUT/data/                                train.jsonl, validation.jsonl, held_out.jsonl: the script's games, by seed
    OUT/model/tokenizer.model                SentencePiece BPE; transformers builds its tokenizer from it when it loads
    OUT/model/                               tokenizer and template with tools, config.json, model.safetensors
    OUT/stamp.json                           what all this was made from: when it still holds, there is nothing to do
"""

import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Games are played in processes of their own, which find the package `examples` by it.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import sentencepiece
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.utils import logging as transformers_logging

from examples.crafter import traces

Record = dict[str, Any]

ENDOFTEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(f"<{end}{name}>" for name in ("tools", "tool_call", "tool_response") for end in ("", "/"))
WORDS = re.compile(r"[^A-Za-z0-9+<|>/]+|(?=\+)")  # between the words of a token
BRACKETS = re.compile(r"(?<=\[)|(?=\])")  # of a list: a token neither goes on after it begins, nor holds its end
MARKS = frozenset('"[]{},:')  # JSON's: by them ` "do",` is not `do`, else an answer may lose its quotes
ASSISTANT = f"{IM_START}assistant\n"  # what an answer follows
# The form of Qwen3's: tools as JSON in the system's message, calls as JSON in <tool_call>, results in the user's turn.
CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' or tools %}
{{- '<|im_start|>system' }}
{%- if messages[0].role == 'system' %}
{{- '\\n' + messages[0].content }}
{%- endif %}
{%- if tools %}
{{- '\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first %}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Settings:
    """All that decides what is made."""

    seed: int = 0
    games: int = 200  # of the script, which slips now and then, to train on
    validation_games: int = 10
    held_out_games: int = 10
    aimless_games: int = 40  # to pretrain on
    vocabulary: int = 1400
    hidden: int = 128
    layers: int = 2
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 32
    experts: int = 8
    experts_per_token: int = 2
    expert_intermediate: int = 128
    pretrain_steps: int = 350
    pretrain_sequences: int = 16  # per step
    pretrain_processes: int = 2
    pretrain_learning_rate: float = 2e-2  # of matrices, with Muon
    pretrain_adam_learning_rate: float = 4e-3  # of all else, with AdamW

    def seeds(self) -> dict[str, range]:
        """Seeds of the games of each part; no two parts share one, nor one with the worlds to be tested in."""
        train, validation, held_out, aimless = (range(k * 50_000, (k + 1) * 50_000) for k in range(4))
        start = 1000 * self.seed
        return {
            "train": train[start : start + self.games],
            "validation": validation[start : start + self.validation_games],
            "held_out": held_out[start : start + self.held_out_games],
            "aimless": aimless[start : start + self.aimless_games],
        }


def main(
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=49, help="of worlds, weights and every choice")] = 0,
    games: Annotated[int, typer.Option(min=1, max=1000, help="of the script, to train on")] = Settings.games,
    aimless_games: Annotated[int, typer.Option(min=1, max=1000, help="to pretrain on")] = Settings.aimless_games,
    pretrain_steps: Annotated[int, typer.Option(help="0 leaves the base model random")] = Settings.pretrain_steps,
) -> None:
    """Make the demo's data set, tokenizer and base model."""
    console = Console()
    settings = Settings(seed=seed, games=games, aimless_games=aimless_games, pretrain_steps=pretrain_steps)
    stamp = {"settings": asdict(settings), "made_from": made_from()}
    stamp_file = out / "stamp.json"
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        console.print(f"{out} is up to date")
        return
    if out.exists() and any(out.iterdir()) and not stamp_file.exists():
        console.print(f"{out} exists and was not made by this tool: remove it, or give another folder with --out")
        raise typer.Exit(2)

    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        world = Path(folder) / "new"
        facts = make_world(world, settings)
        (world / "stamp.json").write_text(json.dumps(stamp, indent=2) + "\n")
        if out.exists():
            out.rename(Path(folder) / "old")
        world.rename(out)

    table = Table(title=f"{out}, made in {time.perf_counter() - start:.0f} s", show_header=False)
    for fact in facts.items():
        table.add_row(*fact)
    console.print(table)


def made_from() -> dict[str, str]:
    """The versions, and the files, that the demo's world depends on."""
    packages = {name: version(name) for name in ("torch", "transformers", "sentencepiece", "crafter", "numpy")}
    sources = [Path(__file__), *sorted((ROOT / "examples/crafter").glob("*.py"))]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    return {"python": platform.python_version(), **packages, **digests}


def make_world(world: Path, settings: Settings) -> dict[str, str]:
    """Write data and model into the folder `world` and return what there is to say about them."""
    data, model_folder = world / "data", world / "model"
    data.mkdir(parents=True)
    model_folder.mkdir()

    played, records = {}, {}
    for name, seeds in settings.seeds().items():
        file = (world if name == "aimless" else data) / f"{name}.jsonl"
        played[name] = traces.write(file, {"aimless": "aimless", "train": "careless"}.get(name, "expert"), seeds)
        with file.open(encoding="utf-8") as lines:
            records[name] = [json.loads(line) for line in lines]
    (world / "aimless.jsonl").unlink()

    tokenizer = make_tokenizer(model_folder, [*records["train"], *records["aimless"]], settings)
    model = make_model(tokenizer, settings)
    loss = pretrain(model, encode(tokenizer, records["aimless"]), settings)
    model.save_pretrained(model_folder)

    lengths = sorted(len(ids) for ids, _ in encode(tokenizer, records["train"]))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    median, longest = lengths[len(lengths) // 2], lengths[-1]
    train, aimless = played["train"], played["aimless"]
    return {
        "games of the script": f"{settings.games} to train on",
        "their mean return": f"{train.mean_return:.2f}, {train.mean_achievements:.1f} of 22 achievements",
        "conversations": f"{train.conversations:,} to train on, with {train.calls:,} calls",
        "tokens": f"{sum(lengths):,} to train on; a conversation has {median} (median), {longest} (longest)",
        "parameters": f"{total:,}, of which {experts:,} in {settings.layers} x {settings.experts} experts",
        "pretraining": f"{settings.pretrain_steps} steps, {aimless.calls:,} aimless calls, last loss {loss:.2f}",
    }


# --- tokenizer ---


def make_tokenizer(folder: Path, records: Sequence[Record], settings: Settings) -> PreTrainedTokenizerBase:
    """Train SentencePiece on the conversations and return it as transformers loads it from `folder`.

    transformers 5 turns a `tokenizer.model` into a backend of the `tokenizers` library at load time: BPE with byte
    fallback, and every user-defined symbol a token of its own. Nothing is normalised: text comes back as it went in.
    A word is one token where it is frequent, with its digits and quotes: a fact of what the player sees is one. It
    learns from single lines, so a newline ends a token and never starts a longer one: the newline after
    `<|im_start|>assistant` cannot merge with the answer. Likewise at the brackets of a list of actions, else a small
    model may forget one.
    """
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            part
            for record in records
            for line in spoken(record).splitlines(keepends=True)
            for part in BRACKETS.split(line)
        ),
        model_writer=trained,
        model_type="bpe",
        vocab_size=settings.vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentence_length=8192,  # bytes; longer ones would be left out
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=[*SPECIAL_TOKENS, *TAGS],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer_config = {
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
        "eos_token": IM_END,
        "pad_token": ENDOFTEXT,
        "extra_special_tokens": [IM_START],
        "added_tokens_decoder": {
            str(1 + len(SPECIAL_TOKENS) + k): {
                "content": tag,
                **dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False),
            }
            for k, tag in enumerate(TAGS)
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))  # AutoTokenizer asks for one
    return AutoTokenizer.from_pretrained(folder)


def spoken(record: Record) -> str:
    """The text of a conversation as the template writes it, without its tokens: for the tokenizer to learn from."""
    lines = [json.dumps(tool) for tool in record.get("tools", [])]
    for message in record["messages"]:
        lines += [message["role"], message["content"]]
        lines += [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
    return "\n".join(lines)


Encoded = tuple[list[int], list[bool]]


def encode(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> list[Encoded]:
    """The tokens of each conversation, and which of them are of an answer."""
    start, end = tokenizer.encode(ASSISTANT, add_special_tokens=False), tokenizer.convert_tokens_to_ids(IM_END)
    result = []
    for record in records:
        text = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        answer, inside = [], False
        for k, token in enumerate(ids):
            inside = inside or ids[max(0, k - len(start)) : k] == start
            answer.append(inside)
            inside = inside and token != end
        result.append((ids, answer))
    return result


# --- model ---


def make_model(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights, but for its tokens: `tree-left-3` begins as the sum of its words' vectors.

    So all facts about trees have something in common from the first step, which a minute would not be enough to learn.
    """
    torch.manual_seed(settings.seed)
    config = Qwen3MoeConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,  # so that tensor parallel can split it
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.head_dim,  # type: ignore[call-arg]  # one of the attributes that the class does not list
        num_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        moe_intermediate_size=settings.expert_intermediate,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    parts: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for token, index in tokenizer.get_vocab().items():
            words = [word for word in WORDS.split(token) if word]
            marks = "".join(mark for mark in token if mark in MARKS)
            words = [*words, *([marks] if marks else [])] or [token]
            for word in words:
                parts.setdefault(word, torch.randn(settings.hidden, generator=word_generator(settings.seed, word)))
            mean = torch.stack([parts[word] for word in words]).sum(0) / len(words) ** 0.5
            model.model.embed_tokens.weight[index] = 10 * config.initializer_range * mean
            model.lm_head.weight[index] = config.initializer_range * mean
    return model


def word_generator(seed: int, word: str) -> torch.Generator:
    """Random numbers of a word."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {word}".encode()).digest()[:8]) >> 1)


def pretrain(model: Qwen3MoeForCausalLM, samples: list[Encoded], settings: Settings) -> float:
    """Train all weights on the answers, with the routers kept in balance; return the last step's loss.

    Each process takes its share of a step's sequences, and gradients are averaged: two processes of one thread are
    faster than one of two, as the model is small.
    """
    model.share_memory()
    loss = torch.full((1,), math.nan).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        job = (model, loss, samples, settings, folder)
        # Forked: a process that imports transformers anew would take 10 s for it.
        start_processes(pretrain_rank, job, nprocs=settings.pretrain_processes, start_method="fork")
    return loss.item()


def pretrain_rank(
    rank: int, result: Qwen3MoeForCausalLM, last: torch.Tensor, samples: list[Encoded], settings: Settings, folder: str
) -> None:
    """Pretrain a copy of the model; rank 0 writes weights and loss into `result` and `last`, which are shared."""
    ranks, steps = settings.pretrain_processes, settings.pretrain_steps
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))  # OMP_NUM_THREADS is of ranks that share the cores
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    model = deepcopy(result)
    model.set_experts_implementation("grouped_mm")
    parameters = list(model.parameters())
    experts = [(fused, [torch.nn.Parameter(one) for one in fused.data]) for fused in parameters if fused.ndim == 3]
    optimizers = make_optimizers(model, [one for _, own in experts for one in own], settings)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            one, one.defaults["lr"], total_steps=max(steps, 1), pct_start=0.1, cycle_momentum=False
        )
        for one in optimizers
    ]
    stream = endless(samples, settings.pretrain_sequences, torch.Generator().manual_seed(settings.seed))
    for _ in track(range(steps), "pretraining the base model", transient=True, disable=rank > 0):
        loss = answer_loss(model, next(stream)[rank::ranks])
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        distributed.all_reduce(gradients)
        for p, mean in zip(parameters, (gradients / ranks).split([p.numel() for p in parameters]), strict=True):
            p.grad = mean.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for fused, own in experts:
            assert fused.grad is not None
            for one, gradient in zip(own, fused.grad, strict=True):
                one.grad = gradient
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if rank == 0:
            last.copy_(loss.detach())
    if rank == 0:
        result.load_state_dict(model.state_dict())
    distributed.destroy_process_group()


def make_optimizers(
    model: Qwen3MoeForCausalLM, experts: list[torch.nn.Parameter], settings: Settings
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for matrices, AdamW for vectors, routers, embeddings and the head.

    In as many steps it gets much further than AdamW for all. It takes matrices only: `experts` are those of the
    fused weights, one by one.
    """
    matrices, rest = list(experts), []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.")):
            rest.append(parameter)
        elif parameter.ndim == 2:
            matrices.append(parameter)
    return [
        torch.optim.Muon(matrices, lr=settings.pretrain_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.pretrain_adam_learning_rate, betas=(0.9, 0.95), fused=True),
    ]


def answer_loss(model: Qwen3MoeForCausalLM, batch: list[Encoded]) -> torch.Tensor:
    """The mean cross-entropy of the answers' tokens, and what keeps the routers in balance.

    Logits are computed where an answer's token is predicted, a fifth of the positions, and no others.
    """
    length = max(len(ids) for ids, _ in batch)
    ids, answer = torch.zeros(len(batch), length, dtype=torch.long), torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (tokens, answered) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        answer[row, : len(tokens)] = torch.tensor(answered)
    output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state[:, :-1][answer[:, 1:]])
    balance = load_balancing_loss_func(output.router_logits, model.config.num_experts, model.config.num_experts_per_tok)
    return cross_entropy(logits, ids[:, 1:][answer[:, 1:]]) + model.config.router_aux_loss_coef * balance


def endless(samples: list[Encoded], size: int, generator: torch.Generator) -> Iterator[list[Encoded]]:
    """Batches of samples of like length, so that little is padded, in random order, again and again."""
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        order.sort(key=lambda index: len(samples[index][0]))
        count = math.ceil(len(order) / size)  # of like size: none too small to be shared by the processes
        edges = [len(order) * k // count for k in range(count + 1)]
        batches = [order[first:end] for first, end in pairwise(edges)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield [samples[one] for one in batches[index]]


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    typer.run(main)
