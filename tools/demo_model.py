"""The demo's base model: a small Qwen3-MoE, pretrained on conversations in a minute or two.

`tools/make_demo.py` makes the conversations and the tokenizer.
"""

import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.progress import track
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

WORDS = re.compile(r"[^A-Za-z0-9+<|>/]+|(?=\+)")  # between the words of a token
MARKS = frozenset('"[]{},:')  # JSON's: by them ` "do",` is not `do`, else an answer may lose its quotes

Encoded = tuple[list[int], list[bool]]  # the tokens of a conversation, and which of them are of an answer


@dataclass(frozen=True)
class ModelSettings:
    """Shape and pretraining of the model."""

    seed: int = 0
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


def make_model(tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> Qwen3MoeForCausalLM:
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


def pretrain(model: Qwen3MoeForCausalLM, samples: list[Encoded], settings: ModelSettings) -> float:
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
    rank: int,
    result: Qwen3MoeForCausalLM,
    last: torch.Tensor,
    samples: list[Encoded],
    settings: ModelSettings,
    folder: str,
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
    model: Qwen3MoeForCausalLM, experts: list[torch.nn.Parameter], settings: ModelSettings
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
