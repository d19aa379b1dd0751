"""Grouped-query causal attention with q/k norm and rotary positions, over concatenated conversations.

S: tokens of this rank's sequence shard; T = S * TP: tokens of the micro batch; h, g: query and key/value heads on this
rank; d: head dimension.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megasft import host
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.linear import LoraLinear
from megasft.model.batch import Segments
from megasft.model.norm import RMSNorm
from megasft.model.qkv import split_qkv
from megasft.storage.shards import Shard, Sharded, full_index


class SelfAttention(Sharded):
    """The self-attention of one Qwen3-MoE layer, for megatron-core's TransformerLayer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        lora: LoraSettings,
        quant: QuantSettings | None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        d = self.head_dim = config.kv_channels
        heads, groups, tp = config.num_attention_heads, config.num_query_groups, pg_collection.tp
        self.heads = heads // tp.size()
        common = {"lora": lora, "group": tp, "dtype": config.params_dtype}
        common |= {"writer": pg_collection.dp.rank() == 0, "quant": quant}
        qkv = {"q_proj": heads * d, "k_proj": groups * d, "v_proj": groups * d}
        self.linear_qkv = LoraLinear(config.hidden_size, qkv, "column", **common)
        self.linear_proj = LoraLinear(heads * d, {"o_proj": config.hidden_size}, "row", **common)
        self.q_layernorm = RMSNorm(config, d, config.layernorm_epsilon)
        self.k_layernorm = RMSNorm(config, d, config.layernorm_epsilon)
        self.core_attention = attention_kernel(config, layer_number, pg_collection)

    def forward(
        self, x: Tensor, attention_mask: None, rotary_pos_emb: Tensor, packed_seq_params: Segments, **_: Any
    ) -> tuple[Tensor, None]:
        """x [S, 1, H], rotary_pos_emb [2, T, d] (cos, sin) -> [S, 1, H] and no bias."""
        qkv = self.linear_qkv(x).squeeze(1)
        q, k, v = split_qkv(qkv, self.heads, self.q_layernorm, self.k_layernorm, rotary_pos_emb)
        y = packed_seq_params.attend(self.layer_number, q, k, v, self.core_attention)
        return self.linear_proj(y.reshape(x.shape[0] * self.linear_qkv.size, 1, -1)), None

    def base_shards(self) -> Iterator[Shard]:
        yield from self.linear_qkv.base_shards()
        yield from self.linear_proj.base_shards()
        for name, norm in (("q_norm", self.q_layernorm), ("k_norm", self.k_layernorm)):
            yield Shard(f"{name}.weight", (self.head_dim,), full_index(self.head_dim), norm.weight.data)

    def adapter_shards(self) -> Iterator[Shard]:
        yield from self.linear_qkv.adapter_shards()
        yield from self.linear_proj.adapter_shards()


def attention_kernel(config: TransformerConfig, layer_number: int, groups: ProcessGroupCollection) -> nn.Module:
    """What attends within segments: q [T, h, d], k and v [T, g, d] -> [T, h, d].

    On GPUs Transformer Engine's kernel if it is installed, else torch's flash attention; both take all segments in one
    call, in 16 bits. On CPUs, and for what those do not take, one call of torch's SDPA per segment.
    """
    sixteen_bits = config.params_dtype != torch.float32
    if sixteen_bits and (engine := host.dot_product_attention()):
        return engine(config, layer_number, AttnMaskType.padding_causal, "self", pg_collection=groups)
    return PackedAttention() if host.packs_attention(config.params_dtype, config.kv_channels) else SegmentedAttention()


class PackedAttention(nn.Module):
    """torch's flash attention over variable lengths: one call for all segments, on GPUs only."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.attention import varlen  # imports dynamo, seconds that runs on CPUs are spared

        self._attend: Callable[..., Any] = varlen.varlen_attn

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, attn_mask_type: Any, packed_seq_params: Segments
    ) -> Tensor:
        """q [T, h, d], k and v [T, g, d] -> [T, h, d]."""
        at = packed_seq_params
        return self._attend(
            q,
            k,
            v,
            at.cu_seqlens_q,
            at.cu_seqlens_kv,
            at.max_seqlen_q,
            at.max_seqlen_kv,
            window_size=(-1, 0),  # causal
            enable_gqa=q.shape[1] > k.shape[1],
        )


class SegmentedAttention(nn.Module):
    """torch's scaled dot-product attention, one call per segment, so that no work or mask crosses conversations."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, attn_mask_type: Any, packed_seq_params: Segments
    ) -> Tensor:
        """q [T, h, d], k and v [T, g, d] -> [T, h, d]."""
        repeat = q.shape[1] // k.shape[1]
        outputs = []
        for qi, ki, vi in zip(*(t.split(packed_seq_params.lengths) for t in (q, k, v)), strict=True):
            qi, ki, vi = (t.transpose(0, 1)[None] for t in (qi, ki, vi))
            y = nn.functional.scaled_dot_product_attention(qi, ki, vi, is_causal=True, enable_gqa=repeat > 1)
            outputs.append(y[0].transpose(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
