"""A micro batch: concatenated conversations and their boundaries."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megasft.lora.dropout import Draw

IGNORED = -100  # a label that is not supervised, as in torch and transformers


@dataclass
class Segments(PackedSeqParams):
    """Lengths of the concatenated conversations of a micro batch. Attention stays within each segment.

    `lengths` is on the host, so that no layer waits for the device. The other fields are megatron-core's description of
    the same segments. The last `padding` tokens belong to no conversation. `draw` is set for a forward with dropout.
    """

    lengths: list[int] = field(default_factory=list)
    padding: int = 0
    draw: Draw | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, padding: int = 0) -> "Segments":
        """Segments of these lengths. If `padding` is not 0, `lengths` includes it."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
        longest = max(lengths)
        return cls(
            "thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest, lengths=list(lengths), padding=padding
        )

    def positions(self, device: torch.device) -> Tensor:
        """Position of each token in its own segment: int64 [1, T]."""
        return torch.cat([torch.arange(n, device=device) for n in self.lengths])[None]

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, core: nn.Module) -> Tensor:
        """Attention of layer `number` with the kernel `core`: q [T, h, d], k and v [T, g, d] -> [T, h, d]."""
        return core(q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=self)


@dataclass
class MicroBatch:
    """Concatenated conversations. T is a multiple of the tensor-parallel size.

    tokens, labels: int64 [T]; labels[i] is the token to predict at position i, or IGNORED. places: int64 [T], the place
    of each token among all tokens of the global batch, however they are cut; needed for dropout only. supervised: int64
    [n], the positions whose labels are not IGNORED, found while they were on the host; needed for the loss only.
    """

    tokens: Tensor
    labels: Tensor
    segments: Segments
    places: Tensor | None = None
    supervised: Tensor | None = None
