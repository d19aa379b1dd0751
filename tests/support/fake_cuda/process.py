"""Turn this process into one rank of a job on GPUs that do not exist.

torch's FakeTensorMode gives tensors on "cuda" that have shapes, strides and dtypes, but no data; every operator runs its
shape function. What else a GPU's process asks for is answered here, and nowhere else:

| what                             | answer                                | why                                                  |
| -------------------------------- | ------------------------------------- | ---------------------------------------------------- |
| `host.CUDA`, `host.prepare`      | true                                  | the code of a GPU is what runs                       |
| `torch.cuda` (`_CUDA`)           | device 0, streams that do nothing     | the real ones start a driver; `synchronize` counts   |
| CUDA's hooks in C++              | "device 0 has no context"             | autograd asks before a backward, and would throw     |
| process groups                   | torch's "fake" backend                | collectives return at once, with their shapes        |
| `all_gather_object`              | every rank says what this one says    | it reads lengths from a device                       |
| `Tensor.data_ptr`                | a place in an invented address space  | so that checks of alignment mean something           |
| megatron-core's CUDA RNG states  | the CPU's                             | a real generator of a device cannot be made          |
| thread pools of loader and saver | run at once, in this thread           | modes of torch belong to a thread                    |
| Transformer Engine's attention   | `Attention`, if it is asked for       | it cannot be constructed without a GPU; its checks   |
|                                  |                                       | of arguments are made here                           |
| and its norm and scale of        | one kernel each, or what megatron-    | fake scalars cannot become a list, as they do in     |
| gradients                        | core does without it                  | megatron-core's own                                  |

Tensors on the host are real: their values are those of a real run. What comes from the device has no value; `watch`
says what `item`, `tolist` and operators with data-dependent shapes answer, and counts each as a host sync.
Not covered: numbers, random states of the device, the fused Adam of Transformer Engine.
"""

import atexit
import contextlib
import ctypes
import os
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GiB = 2**30
ALIGNED = 512  # bytes, of the caching allocator's blocks


def install(synchronized: Callable[[str], None]) -> None:
    """Answer for CUDA from now on. `synchronized` is told of each wait for the device."""
    os.environ["LOCAL_RANK"] = "0"
    # All that dispatches on whether CUDA is there at import time is imported before CUDA is pretended.
    import megatron.core.tensor_parallel.random as megatron_random

    import megasft.data.loader
    import megasft.train.checkpoint.async_writer
    import megasft.train.trainer
    from megasft import host

    torch._C._ensureCUDADeviceGuardSet()
    _deny_primary_context()
    for name, answer in _cuda(synchronized).items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.data_ptr = Addresses()
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
    host.CUDA = True
    host.prepare()
    megasft.data.loader.ThreadPoolExecutor = megasft.train.checkpoint.async_writer.ThreadPoolExecutor = AtOnce
    dist.new_group, dist.all_gather_object = _fake_group, _everyone_says_so


# --- torch.cuda -------------------------------------------------------------------------------------------------------


class Stream:
    """A stream or an event of a device that does everything in order. Waiting for it is a host sync."""

    told: Callable[[str], None]

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def wait(self, _: Any = None) -> None: ...

    def record_event(self, _: Any = None) -> "Stream":
        return self

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        Stream.told("synchronize")


def _cuda(synchronized: Callable[[str], None]) -> dict[str, Any]:
    Stream.told = staticmethod(synchronized)
    main = Stream()
    properties = types.SimpleNamespace(
        name="no GPU", major=9, minor=0, multi_processor_count=132, total_memory=141 * GiB, uuid="0"
    )
    return {
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device_count": lambda: 1,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda *_: main,
        "default_stream": lambda *_: main,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: synchronized("synchronize"),
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_, **__: torch.empty(0),
        "manual_seed": lambda _: None,
    }


def _deny_primary_context() -> None:
    """Have torch's C++ interface to CUDA say that no device has a context.

    A backward asks for each device of the guard that FakeTensorMode sets, and torch 2.13 throws where there is no
    driver. No Python interface reaches that answer (a PrivateUse1 backend takes CUDA's place as the accelerator, and
    then autograd finds no stream for CUDA's tensors). So one entry of the object's table of virtual functions is
    replaced, that which makes a backward work; the table is put back before the process ends.
    """
    if _backward_works():
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get = library._ZN2at6detail12getCUDAHooksEv  # at::detail::getCUDAHooks()
    get.restype = ctypes.c_void_p
    table_of = ctypes.cast(get(), ctypes.POINTER(ctypes.c_void_p))
    original, entries, above = table_of[0], 64, 2  # two words lie above the first function
    size = entries + above
    words = ctypes.cast(original - above * 8, ctypes.POINTER(ctypes.c_void_p * size)).contents
    says_no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, device: False)
    # The functions before it in torch 2.13 are two destructors and two that autograd does not call here.
    for entry in range(4, 12):
        table = (ctypes.c_void_p * size)(*words)
        table[entry + above] = ctypes.cast(says_no, ctypes.c_void_p).value
        table_of[0] = ctypes.addressof(table) + above * 8
        if _backward_works():
            _kept.append((table, says_no))
            atexit.register(table_of.__setitem__, 0, original)
            return
        table_of[0] = original
    raise RuntimeError("hasPrimaryContext is not among the first functions of at::CUDAHooksInterface in this torch")


_kept: list[Any] = []


def _backward_works() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(2, device="cuda", requires_grad=True)
        try:
            (weight * 2).sum().backward()
        except RuntimeError:
            return False
        return True


class Addresses:
    """`Tensor.data_ptr` of fake tensors: storages lie one after the other, each on its own block of the allocator."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        self._next = 2**20
        self._real = torch.Tensor.data_ptr

    def __get__(self, tensor: torch.Tensor, _: Any = None) -> Callable[[], int]:
        return lambda: self.of(tensor)

    def of(self, tensor: torch.Tensor) -> int:
        """The address of the tensor's first element."""
        if not isinstance(tensor, torch._subclasses.FakeTensor):
            return self._real(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._starts:
            self._starts[key] = self._next
            self._next += -(-storage.nbytes() // ALIGNED) * ALIGNED + ALIGNED
            weakref.finalize(storage, self._starts.pop, key, None)
        return self._starts[key] + tensor.storage_offset() * tensor.element_size()


# --- ranks and threads ------------------------------------------------------------------------------------------------


def join(world: int, rank: int) -> None:
    """Be this rank of a world from now on."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megasft.distributed.topology import leave_world

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    if dist.is_initialized():
        leave_world()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


_new_group = dist.new_group


def _fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("pg_options", None)
    return _new_group(ranks, timeout, "fake", None, *args[1:], **kwargs)


def _everyone_says_so(said: list[Any], own: Any, group: Any = None) -> None:
    said[:] = [own] * len(said)


class AtOnce:
    """A thread pool without a thread."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, function: Callable, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_: Any) -> None: ...


# --- attention --------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fake_cuda", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v, int longest) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor gy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, int longest)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("attention", lambda q, k, v, _: (torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)),
              "Meta")  # fmt: skip
_library.impl("attention_backward", lambda gy, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))), "Meta")


class _Attention(torch.autograd.Function):
    """Saves what fused attention saves: q, k, v, the result, and one fp32 number for each row and head."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, longest: int) -> Any:
        y, lse = torch.ops.fake_cuda.attention(q, k, v, longest)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.longest = longest
        return y

    @staticmethod
    def backward(ctx: Any, gy: Any) -> Any:
        return *torch.ops.fake_cuda.attention_backward(gy.contiguous(), *ctx.saved_tensors, ctx.longest), None


class Attention(torch.nn.Module):
    """megatron-core's TEDotProductAttention as far as its arguments go; `te_signature` compares these with the source.

    Transformer Engine 2.20 checks for `thd`: three dimensions, one dtype of 16 bits, boundaries int32 on the device, the
    longest segment an int on the host, a causal padding mask, heads that key/value heads divide.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, pg_collection: Any = None
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        tp = pg_collection.tp.size()
        self.heads, self.groups, self.width = (
            config.num_attention_heads // tp, config.num_query_groups // tp, config.kv_channels
        )  # fmt: skip

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: Any, attn_mask_type: Any, packed_seq_params: Any
    ) -> Any:
        """query [T, h, d], key and value [T, g, d] -> [T, h d]."""
        p = packed_seq_params
        assert attention_mask is None
        assert attn_mask_type.name == "padding_causal"
        assert p.qkv_format == "thd"
        for tensor, heads in ((query, self.heads), (key, self.groups), (value, self.groups)):
            assert tensor.is_cuda
            assert tensor.dtype in (torch.bfloat16, torch.float16)
            assert tensor.shape[1:] == (heads, self.width)
            assert tensor.stride(-1) == 1
            assert tensor.data_ptr() % 16 == 0
        assert self.heads % self.groups == 0
        for ends in (p.cu_seqlens_q, p.cu_seqlens_kv):
            assert ends.is_cuda
            assert ends.dtype == torch.int32
            assert ends.shape == (len(p.lengths) + 1,)
        assert type(p.max_seqlen_q) is type(p.max_seqlen_kv) is int
        assert sum(p.lengths) == len(query)
        return _Attention.apply(query, key, value.contiguous(), p.max_seqlen_q).flatten(1)


_library.define("norm(Tensor[] tensors) -> Tensor")
_library.define("scale(Tensor[] tensors, float factor) -> ()")
_library.impl("norm", lambda tensors: tensors[0].new_empty(1, dtype=torch.float32), "Meta")
_library.impl("scale", lambda tensors, factor: None, "Meta")


def _norm_in_one(chunk: int, overflow: Any, lists: list[list[Any]], *_: Any) -> tuple[Any, None]:
    return torch.ops.fake_cuda.norm(lists[0]), None


def _norm_of_each(chunk: int, overflow: Any, lists: list[list[Any]], *_: Any) -> tuple[Any, None]:
    """megatron-core's without Transformer Engine: a list of norms becomes a tensor on the host, one wait for each."""
    return torch.tensor([sum(float(torch.norm(tensor)) for tensor in lists[0])], device="cuda"), None


def _scale_in_one(chunk: int, overflow: Any, lists: list[list[Any]], factor: Any) -> None:
    torch.ops.fake_cuda.scale(lists[0], float(factor))


@contextlib.contextmanager
def transformer_engine(present: bool) -> Iterator[None]:
    """What is called of it, or what is called where it is not installed."""
    from megatron.core.optimizer import clip_grads

    from megasft import host

    before = host.dot_product_attention, clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl
    host.dot_product_attention = lambda: Attention if present else None  # type: ignore[assignment]
    clip_grads.l2_norm_impl = _norm_in_one if present else _norm_of_each
    if present:
        clip_grads.multi_tensor_scale_impl = _scale_in_one
    try:
        yield
    finally:
        host.dot_product_attention, clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = before
