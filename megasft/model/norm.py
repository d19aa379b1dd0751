"""RMSNorm with a frozen weight, for all tokens or for a sequence shard."""

from typing import Any

import torch
from torch import Tensor, nn

from megasft import host


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    The signature is the one that megatron-core's layer spec calls. The weight comes from a checkpoint and is frozen.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=host.device()), False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] in any float dtype -> the same shape; the mean square is computed in fp32."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
