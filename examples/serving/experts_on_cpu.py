"""vLLM's experts with LoRA on CPUs. Its own kernel for them is in Triton and needs a GPU.

`experts` stands in for that kernel alone: loading, LoRA layers, routing, attention, sampling and everything else are
vLLM's. A model without LoRA, a merged one among them, uses vLLM's own kernel for experts on CPUs.
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts


def install() -> None:
    """Let vLLM 0.32 compute experts with LoRA by `experts`, in this process."""
    TritonExperts.apply = experts


def experts(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_: Any, **__: Any) -> None:
    """What `TritonExperts.apply` computes in `output` [T, H], from w1 [E, 2 F, H] and w2 [E, H, F], in plain torch."""
    lora = self._lora_context
    slots = (
        lora.punica_wrapper.token_lora_indices[: len(hidden_states)] if lora else torch.full_like(topk_ids[:, 0], -1)
    )
    total = torch.zeros_like(output)
    for slot in slots.unique().tolist():
        for e in topk_ids.unique().tolist():
            tokens, place = torch.nonzero((topk_ids == e) & (slots == slot)[:, None], as_tuple=True)
            x = hidden_states[tokens]
            gate_up = x @ w1[e].T
            if slot >= 0:
                pairs = zip(lora.w13_lora_a_stacked, lora.w13_lora_b_stacked, strict=True)
                gate_up = gate_up + torch.cat([x @ A[slot, e].T @ B[slot, e].T for A, B in pairs], dim=-1)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            y = inner @ w2[e].T
            if slot >= 0:
                y = y + inner @ lora.w2_lora_a_stacked[0][slot, e].T @ lora.w2_lora_b_stacked[0][slot, e].T
            total.index_add_(0, tokens, y * topk_weights[tokens, place, None])
    output.copy_(total)
