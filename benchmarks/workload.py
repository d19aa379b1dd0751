"""The timed workload: model shapes, random weights, random conversations, and its FLOPs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megasft.config.values import ALL_LINEAR
from megasft.data.dataset import Samples
from megasft.model.flops import Flops, step_flops

RANK = 16  # LoRA r; alpha is twice it


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE with experts in all layers, and the micro batch of one rank."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    vocabulary: int
    conversations: int  # per micro batch, all of the same length, so that no side needs padding
    length: int  # input tokens per conversation

    def hf_config(self) -> Qwen3MoeConfig:
        """The `config.json` of this shape."""
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,  # type: ignore[call-arg]  # one of the attributes that the class does not list
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            moe_intermediate_size=self.expert_intermediate,
            norm_topk_prob=True,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
        )


PRESETS = {
    # the model of tools/make_demo.py with the micro batch of configs/demo.toml
    "demo": Shape(128, 2, 8, 4, 32, 8, 2, 128, 1472, conversations=8, length=256),
    "small": Shape(512, 4, 8, 2, 64, 32, 4, 192, 8192, conversations=1, length=1024),
    # one layer of Qwen3-Coder-30B-A3B at its true size, with a small vocabulary
    "slice": Shape(2048, 1, 32, 4, 128, 128, 8, 768, 8192, conversations=1, length=1024),
    # for tests
    "tiny": Shape(64, 2, 4, 2, 16, 8, 2, 32, 256, conversations=2, length=32),
}


@dataclass(frozen=True)
class Workload:
    """What each side computes in a step, and the number of steps."""

    shape: Shape
    dtype: str  # "bf16" or "fp32"
    steps: int  # timed
    warmup: int  # untimed, before them
    supervised: float = 1.0  # share of the targets
    recompute: bool = False  # activation checkpointing
    deterministic: bool = False
    topology: dict[str, int] = field(default_factory=dict)

    @property
    def supervised_targets(self) -> int:
        """Supervised targets per conversation, at least one."""
        return max(1, round(self.supervised * self.shape.length))

    def settings(self, model: str) -> dict[str, Any]:
        """The settings of a run file for the model folder `model`."""
        return {
            "job": {"model": model, "seed": 0, "deterministic": self.deterministic},
            "data": {"topology": self.topology},
            "lora": {"r": RANK, "alpha": 2 * RANK, "dropout": 0.0, "target_modules": ["all-linear"]},
            "hyperparameters": {
                "per_device_batch": self.shape.conversations,
                "sequence_length": self.shape.length + 1,
                "learning_rate": 1e-3,
                "lr_schedule": "constant",
                "parallelism": {"bf16": self.dtype == "bf16", "activation_checkpointing": self.recompute},
            },
        }

    def write_model(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint of random weights, so large that every part of the model affects the loss."""
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(self.shape.hf_config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0, 0.1)
                else:
                    parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        if self.dtype == "bf16":
            model.bfloat16()
        model.save_pretrained(folder)

    def samples(self, steps: int, replicas: int) -> Samples:
        """Conversations of random tokens for `steps` steps, with the last targets of each conversation supervised.

        Every step gets new tokens, as in training, so that the rows of an expert vary from step to step.
        """
        generator = torch.Generator().manual_seed(1)
        count = steps * replicas * self.shape.conversations
        length = self.shape.length + 1  # the last token is only a target
        ids = torch.randint(0, self.shape.vocabulary, (count, length), dtype=torch.int32, generator=generator)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        mask[:, -self.supervised_targets :] = True
        return Samples(ids.flatten(), mask.flatten(), torch.arange(1, count + 1) * length)

    def tokens(self, replicas: int) -> int:
        """Input tokens per step."""
        return replicas * self.shape.conversations * self.shape.length

    @property
    def expert_product(self) -> tuple[int, int, int]:
        """Rows, inputs and outputs of an expert's first product, where all experts are equally busy."""
        shape = self.shape
        rows = max(1, self.tokens(1) * shape.experts_per_token // shape.experts)
        return rows, shape.hidden, 2 * shape.expert_intermediate

    def expert_flops(self, replicas: int) -> float:
        """Those FLOPs of a step, over all ranks, that multiply experts' frozen weights."""
        rows, inputs, outputs = self.expert_product
        products = self.shape.layers * self.shape.experts * 1.5  # `down` has half the weights
        return replicas * products * 2 * rows * inputs * outputs * (2 + (2 / 3 if self.recompute else 0))

    def flops(self, replicas: int) -> Flops:
        """FLOPs per step over all ranks."""
        shape, conversations = self.shape, replicas * self.shape.conversations
        return step_flops(
            shape.hf_config(),
            frozenset(ALL_LINEAR),
            RANK,
            self.tokens(replicas),
            conversations * self.supervised_targets,
            conversations * shape.length**2,
            self.recompute,
        )
