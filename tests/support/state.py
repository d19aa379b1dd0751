"""What a rank holds between two steps."""

from typing import Any

from megasft.quant.weight import QuantizedWeight, workspace_bytes
from megasft.train.optimizer import owned


def held(model: Any, trainer: Any) -> dict[str, int]:
    """Bytes by kind, under the names of `plan.state.state_bytes`. In fp32 the master weights are the weights."""
    buffers = trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    states = [state for part in owned(trainer.optimizer) for state in part.states.values()]
    return {
        "frozen weights": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "4-bit weights": sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedWeight)),
        "dequantization workspace": workspace_bytes(),
        "adapters": sum(b.param_data.nbytes for b in buffers),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer states": sum(s.nbytes for s in states if s.untyped_storage()._cdata not in weights),
    }
