"""RMSNorm with a frozen weight, on whole tokens or on a sequence shard alike."""

from typing import Any

import torch
from torch import Tensor, nn

from megasft import host


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    The signature is what megatron-core's layer spec calls; the weight is read from a checkpoint and not trained.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=host.device()), False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] in any float dtype; the mean square is taken in fp32."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
