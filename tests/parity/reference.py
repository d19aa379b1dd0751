"""The same model and adapters in transformers alone, with LoRA written out: W_eff = W + alpha / r * B A."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

PREFIX = "base_model.model."


def tiny_config(**changes) -> Qwen3MoeConfig:
    """Three layers, the middle one dense; a vocabulary that no tensor-parallel size divides."""
    settings = {
        "vocab_size": 203,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3MoeConfig(**(settings | changes))


def random_model(config: Qwen3MoeConfig, seed: int = 0) -> Qwen3MoeForCausalLM:
    """A random model in fp32, with weights so large that every part of the model affects the logits."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1)
            else:
                untied_embedding = "embed" in name and not config.tie_word_embeddings
                parameter.normal_(0.0, 1.0 if untied_embedding else parameter.shape[-1] ** -0.5)
    return model


def linear_shapes(config: Qwen3MoeConfig) -> dict[str, tuple[int, int]]:
    """All linear layers that LoRA can adapt: name in a hub checkpoint and [outputs, inputs]."""
    h, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
            shapes[f"{layer}.self_attn.{name}_proj"] = shape
        sparse = i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        if sparse:
            shapes[f"{layer}.mlp.gate"] = (config.num_experts, h)
        f = config.moe_intermediate_size if sparse else config.intermediate_size
        for path in [f"experts.{e}." for e in range(config.num_experts)] if sparse else [""]:
            for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                shapes[f"{layer}.mlp.{path}{name}_proj"] = shape
    return shapes


def random_adapter(config: Qwen3MoeConfig, r: int, targets: frozenset[str], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random A and B of every target; with B = 0, the gradients of A would be zero."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, (n, k) in linear_shapes(config).items():
        if name.rpartition(".")[2] in targets:
            adapter[f"{name}.lora_A.weight"] = torch.randn(r, k, generator=generator) * k**-0.5
            adapter[f"{name}.lora_B.weight"] = torch.randn(n, r, generator=generator) * 0.05
    return adapter


def write_adapter(adapter: dict[str, torch.Tensor], folder: Path, r: int, alpha: float) -> Path:
    """Write the adapter in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: value.detach().contiguous() for name, value in adapter.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Reference:
    """A transformers model with adapters."""

    def __init__(self, model: Qwen3MoeForCausalLM, adapter: dict[str, torch.Tensor], scaling: float) -> None:
        self.model, self.scaling = model.requires_grad_(False), scaling
        self.adapter = {name: value.clone().requires_grad_() for name, value in adapter.items()}

    def _delta(self, name: str) -> torch.Tensor | None:
        A, B = self.adapter.get(f"{name}.lora_A.weight"), self.adapter.get(f"{name}.lora_B.weight")
        return None if A is None or B is None else self.scaling * B @ A

    def effective(self) -> dict[str, torch.Tensor]:
        """The parameters of the transformers model with every adapter's delta added."""
        parameters = dict(self.model.named_parameters())
        for name, weight in list(parameters.items()):
            if name.endswith("experts.gate_up_proj"):
                deltas = [self._stack(name, e, ("gate_proj", "up_proj"), weight[e]) for e in range(len(weight))]
                parameters[name] = weight + torch.stack(deltas)
            elif name.endswith("experts.down_proj"):
                deltas = [self._stack(name, e, ("down_proj",), weight[e]) for e in range(len(weight))]
                parameters[name] = weight + torch.stack(deltas)
            else:
                delta = self._delta(name.removesuffix(".weight"))
                if delta is not None:
                    parameters[name] = weight + delta
        return parameters

    def _stack(self, name: str, e: int, projections: tuple[str, ...], weight: torch.Tensor) -> torch.Tensor:
        stem = name.rpartition(".")[0]
        parts = weight.chunk(len(projections))
        deltas = [self._delta(f"{stem}.{e}.{projection}") for projection in projections]
        return torch.cat(
            [part.new_zeros(part.shape) if delta is None else delta for part, delta in zip(parts, deltas, strict=True)]
        )

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [L] of one conversation -> logits [L, vocabulary]."""
        return functional_call(self.model, self.effective(), (ids[None],), {"use_cache": False}).logits[0]

    def loss(self, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Mean cross entropy over all supervised tokens of (ids, mask) samples."""
        effective = self.effective()
        total, count = 0.0, 0
        for ids, mask in samples:
            logits = functional_call(self.model, effective, (ids[None],), {"use_cache": False}).logits[0]
            at = mask[1:].nonzero().squeeze(1)
            total = total + torch.nn.functional.cross_entropy(logits[at], ids[at + 1], reduction="sum")
            count += len(at)
        return total / count
