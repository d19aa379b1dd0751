"""megatron-core's DDP and distributed Adam around the adapters, and the gradient sums that megatron-core leaves out.

Only what is trained enters DDP's buffers. Gradients are added up in fp32 over micro batches, then reduce-scattered over
data parallel; each rank keeps the fp32 master weights and moments of its share only (ZeRO stage 2, Rajbhandari et al.
2019, arXiv:1910.02054) and the updated weights are all-gathered.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from torch import Tensor, nn

from megasft.config.schema import HyperparameterSettings
from megasft.distributed.topology import Topology
from megasft.model.qwen3_moe import Qwen3Moe


def wrap(
    model: Qwen3Moe, hyper: HyperparameterSettings, on_reduce: Callable[[], None] = lambda: None
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """The model in DDP, and AdamW with its states sharded over data parallel.

    `on_reduce` is called after the last backward of a step, before gradients are reduced.
    """
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
            clip_grad=hyper.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=model.topology.groups,
    )
    # One for the experts and one for the rest; each would gather the parameters of both (megatron-core 0.19.2).
    for part in _parts(optimizer)[:-1]:
        part._defer_param_sync = True
    model.config.no_sync_func = ddp.no_sync
    model.config.finalize_model_grads_func = _finalizer(model.topology, on_reduce)
    return ddp, optimizer


def step(optimizer: MegatronOptimizer) -> tuple[float, bool]:
    """Clip and apply the gradients: (their norm before, whether they were applied: not where it is not finite).

    The norm is that of all ranks' gradients, so all ranks do the same.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    for part in _parts(optimizer):
        if part.config.clip_grad and (parameters := part.get_parameters()):
            clip_grads.clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm, True


@dataclass(frozen=True)
class Owned:
    """What this rank keeps for elements start:end of a flattened parameter: fp32 master weights and Adam's moments.

    `states` are the optimizer's own tensors, by the names `STATES`; moments that Adam has not made yet are absent.
    """

    parameter: nn.Parameter
    start: int
    end: int
    states: dict[str, Tensor]


STATES = ("master", "exp_avg", "exp_avg_sq")


def owned(optimizer: MegatronOptimizer) -> Iterator[Owned]:
    """The part of each parameter whose states this rank keeps, in an order that stays."""
    for part in _parts(optimizer):
        for parameter in part.model_param_group_index_map:
            span = part._get_model_param_range_map(parameter)["param"]
            if span.end > span.start:
                group, place = part.model_param_group_index_map[parameter]
                master = part.optimizer.param_groups[group]["params"][place]
                moments = part.optimizer.state.get(master, {})
                states = {name: moments[name] for name in STATES[1:] if name in moments}
                yield Owned(parameter, span.start, span.end, {"master": master.data, **states})


def make_moments(optimizer: MegatronOptimizer, steps: int) -> None:
    """Have Adam make the moments of all it owns, to be filled, as after `steps` steps. Spoils the master weights."""
    for part in _parts(optimizer):
        if part.model_param_group_index_map:
            part._init_optimizer_states_with_dummy_values()
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):  # torch's Adam counts by parameter, fused ones by group
                    state["step"].fill_(steps)
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = steps


def _parts(optimizer: MegatronOptimizer) -> list:
    return [
        part
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if not getattr(part, "is_stub_optimizer", False)
    ]


def _finalizer(topology: Topology, on_reduce: Callable[[], None]):
    def finalize(chunks: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
        """Reduce over data parallel, add up partial gradients over TP and expert TP, divide by the batch's tokens."""
        on_reduce()
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
    return sum(state.numel() * state.element_size() for part in owned(optimizer) for state in part.states.values())
