"""Stand-ins that let megatron-core run on CPUs with gloo.

megatron-core asks `torch.cuda` for devices, streams and random states. `run_megatron_on_cpus` gives the megatron-core
modules, and only them, a stand-in for the name `torch` whose CUDA side answers for the CPU. Nothing of torch itself is
changed, so other libraries in the process behave as before. It is never called where CUDA is present.
"""

import contextlib
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch


def run_megatron_on_cpus() -> None:
    """Patch megatron-core 0.19.2 for CPUs; call it once, before any process group is made."""
    # Its tracker warns when the CPU's random state changes while the GPU's is forked; here they are one state.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.optimizer.optimizer as base_optimizer
    import megatron.core.pipeline_parallel
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_layer  # noqa: F401 (all these must be in sys.modules below)
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    stand_in = _torch_without_cuda()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]

    megatron_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_on_host  # type: ignore[attr-defined]
    optimizer = distrib_optimizer.DistributedOptimizer
    build = optimizer._build_model_and_main_param_groups
    optimizer._build_model_and_main_param_groups = classmethod(_reading_types_as_cuda(build.__func__))
    clip = _reading_types_as_cuda(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = base_optimizer.clip_grad_by_total_norm_fp32 = clip


def _torch_without_cuda() -> types.ModuleType:
    """A module that is torch in all but CUDA: `cuda` answers for the CPU and `device="cuda"` means the CPU."""
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    stand_in.cuda = _CpuForCuda("torch.cuda")  # type: ignore[attr-defined]
    stand_in.distributed = types.ModuleType("torch.distributed")  # type: ignore[attr-defined]
    stand_in.distributed.__dict__.update(torch.distributed.__dict__)
    stand_in.distributed.__dict__["__getattr__"] = lambda name: getattr(torch.distributed, name)
    stand_in.distributed.all_gather = _gather_uneven
    stand_in.distributed.reduce_scatter = _scatter_uneven
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(stand_in, name, _on_cpu(getattr(torch, name)))
    return stand_in


def _gather_uneven(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    """`all_gather` of tensors with different numbers of rows, which NCCL takes and gloo does not."""
    rows = max(len(output) for output in outputs)
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    wide = [torch.empty_like(padded) for _ in outputs]
    torch.distributed.all_gather(wide, padded, group=group)
    for output, received in zip(outputs, wide, strict=True):
        output.copy_(received[: len(output)])


def _scatter_uneven(output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None) -> None:
    """`reduce_scatter` of the same kind."""
    total = torch.cat(inputs)
    torch.distributed.all_reduce(total, group=group)
    output.copy_(total.split([len(part) for part in inputs])[group.rank()])


def _on_cpu(make: Callable) -> Callable:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


class _CpuForCuda(types.ModuleType):
    """`torch.cuda` for megatron-core on a CPU: one device, the CPU; streams and events that do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def is_available(self) -> bool:
        return False

    def is_current_stream_capturing(self) -> bool:
        return False

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def current_stream(self, device: Any = None) -> "_Stream":
        return _STREAM

    default_stream = current_stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def Stream(self, *args: Any, **kwargs: Any) -> "_Stream":
        return _STREAM

    def Event(self, *args: Any, **kwargs: Any) -> "_Stream":
        return _STREAM


class _Stream:
    """A stream or an event on a device that does everything at once, in order."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


_STREAM = _Stream()


def _splits_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # megatron-core 0.19.2 leaves a CPU tensor a tensor, and gloo refuses a tensor as split sizes.
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _reading_types_as_cuda(function: Callable) -> Callable:
    """Run `function` while `Tensor.type()` names CUDA types: megatron-core compares those names with strings."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _types_read_as_cuda():
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def _types_read_as_cuda() -> Iterator[None]:
    original = torch.Tensor.type

    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
