"""megatron-core's DDP and distributed Adam around the adapters, and the gradient sums that megatron-core leaves out.

Only what is trained enters DDP's buffers. Gradients are added up in fp32 over micro batches, then reduce-scattered over
data parallel; each rank keeps the fp32 master weights and moments of its share only (ZeRO stage 2, Rajbhandari et al.
2019, arXiv:1910.02054) and the updated weights are all-gathered.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from megasft.config import HyperparameterSettings
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.topology import Topology


def wrap(model: Qwen3Moe, hyper: HyperparameterSettings) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """The model in DDP, and AdamW with its states sharded over data parallel."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    dtype = model.config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=hyper.learning_rate,
            weight_decay=hyper.weight_decay,
            adam_beta1=hyper.adam_beta1,
            adam_beta2=hyper.adam_beta2,
            adam_eps=hyper.adam_eps,
            # Clipping at infinity scales nothing, and the norm is still measured.
            clip_grad=hyper.max_grad_norm or math.inf,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=model.topology.groups,
    )
    model.config.no_sync_func = ddp.no_sync
    model.config.finalize_model_grads_func = _finalizer(model.topology)
    return ddp, optimizer


def _finalizer(topology: Topology):
    def finalize(chunks: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
        """Reduce over data parallel, add up partial gradients over TP and expert TP, divide by the batch's tokens."""
        finalize_model_grads(chunks, num_tokens, **kwargs)  # type: ignore[arg-type]
        if topology.sizes.expert_tensor > 1:
            add_partial_expert_gradients(chunks[0].parameters(), topology.groups.expt_tp)

    return finalize


def add_partial_expert_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add up over expert-tensor parallel the gradients of the factors that all its ranks hold (see lora.grouped)."""
    partial = [p for p in parameters if p.requires_grad and getattr(p, "partial_over_expert_tp", False)]
    grads: list[Tensor] = [p.main_grad for p in partial]  # type: ignore[attr-defined]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def optimizer_state_bytes(optimizer: MegatronOptimizer) -> int:
    """Bytes of fp32 master weights and Adam moments on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    total = 0
    for part in parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                tensors = [parameter, *(value for value in state.values() if isinstance(value, Tensor) and value.dim())]
                total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total
