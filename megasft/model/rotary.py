"""Rotary position embedding with all static rope scalings of transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megasft import host
from megasft.model.shape import head_dim


class RotaryEmbedding:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    The inverse frequencies of scaled variants come from transformers. Importing its Qwen3-MoE model instead would cost
    each rank a second.
    """

    def __init__(self, config: Qwen3MoeConfig) -> None:
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        if rope["rope_type"] == "default":
            d = head_dim(config)
            inverse, self.scaling = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float) / d), 1.0
        else:
            inverse, self.scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        self.inverse_frequencies = inverse.to(host.device())

    @torch.no_grad()
    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions int64 [1, T] -> (cos, sin), each [1, T, head_dim], computed in fp32; both halves are equal."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
