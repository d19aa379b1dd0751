"""Count what a step would do on a GPU, and check what its kernels are given.

A kernel here is an operator that runs on the device and is no view: one launch, some libraries make more of it. Bytes
are those of its tensors, each read or written once; FLOPs those of matrix products and attention.
"""

import functools
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.fake_cuda.process import ALIGNED
from tests.support.traffic import collective

# They run nothing on the device: they allocate, or describe memory anew.
_NOTHING = {
    "aten::detach", "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::lift_fresh", "aten::alias", "aten::view", "aten::is_same_size", "aten::resize_", "aten::set_",
    "aten::record_stream", "prim::device", "aten::sym_size", "aten::is_pinned",
}  # fmt: skip
LAUNCHES = {"megasft::sort_copies": 2}  # of our operators, where it is not one
_WRITES_ONLY = {"copy_", "zero_", "fill_"}  # of the operators that write their first argument
_GATHERS = {"aten::index_select", "aten::index", "aten::gather", "aten::embedding"}  # read no more than they write


@dataclass
class Counts:
    """What ran in one phase of a step.

    ran: how often (operator, bytes, FLOPs) did. syncs: by (what, file:line). calls, sent: of collectives, by (group,
    kind), as `StepTraffic`. peak, live: bytes of the device at most and at the end. grouped: the layouts of grouped
    products.
    """

    ran: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    grouped: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    live: int = 0

    @property
    def kernels(self) -> Counter[str]:
        """Launches, by operator."""
        return self._sum(lambda name, *_: LAUNCHES.get(name, 1))

    @property
    def bytes(self) -> Counter[str]:
        """Bytes read and written, by operator."""
        return self._sum(lambda _, size, __: size)

    @property
    def flops(self) -> Counter[str]:
        """Operations of products, by operator."""
        return self._sum(lambda _, __, operations: operations)

    def _sum(self, of: Callable[[str, int, int], int]) -> Counter[str]:
        found: Counter[str] = Counter()
        for one, n in self.ran.items():
            found[one[0]] += n * of(*one)
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.kernels.total():,} kernels, {self.bytes.total() / 1e9:.1f} GB moved, "
            f"{self.flops.total() / 1e12:.2f} TFLOP, {self.syncs.total()} host syncs; "
            f"peak {self.peak / 2**30:.2f} GiB, {self.live / 2**30:.2f} GiB at the end"
        ]
        lines += [f"  sync {n:5}  {what} at {where}" for (what, where), n in self.syncs.most_common()]
        lines += [
            f"  {n:5} {kind} over {group}, {self.sent[group, kind] / 1e6:.1f} MB"
            for (group, kind), n in sorted(self.calls.items())
        ]
        return "\n".join(lines)


class Answers:
    """What the device would say: `copies` rows of tokens on this rank's experts, all experts equally busy.

    `splits`: the rows of the next arrays of numbers that an all-to-all asks for. `message`: the shape that a pipeline
    stage receives.
    """

    def __init__(self) -> None:
        self.copies = 1
        self.splits: list[int] = []
        self.message = [1, 1, 1]

    def item(self, tensor: Tensor) -> Any:
        if tensor.dtype.is_floating_point:
            return 1.0
        return True if tensor.dtype == torch.bool else self.copies

    def listed(self, tensor: Tensor) -> Any:
        """A flat list, for `tolist`."""
        n = tensor.numel()
        if tensor.dtype.is_floating_point:
            return [1.0] * n
        if tensor.shape == (3,):
            return list(self.message)
        return np.cumsum(_even(self.copies, n)).tolist() if tensor.dtype == torch.int32 else _even(self.copies, n)

    def array(self, tensor: Tensor) -> np.ndarray:
        """For `numpy`."""
        return np.array(_even(self.splits.pop(0), tensor.numel())).reshape(tensor.shape)

    def found(self, tensor: Tensor) -> int:
        """How many elements of a mask are set: of one over tokens all, of one over experts those of the copies."""
        return len(tensor) if tensor.dim() == 1 else self.copies


def _even(total: int, n: int) -> list[int]:
    return [total // n + (i < total % n) for i in range(n)]


class Watch(TorchDispatchMode):
    """Runs operators of fake CUDA tensors in `fake`, and those of host tensors for real; counts the former.

    Raises AssertionError where a host tensor meets a tensor of the device, or where a grouped product gets what the
    kernels of torch 2.13 for sm90 do not take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers = Answers()
        self.counts = Counts()
        self.live = 0
        self._storages: dict[int, int] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        torch.Tensor.tolist = FakeTensor.tolist = _tolist(torch.Tensor.tolist, self)  # type: ignore[method-assign]
        torch.Tensor.numpy = _numpy(torch.Tensor.numpy, self)  # type: ignore[method-assign]

    @contextmanager
    def phase(self) -> Iterator[Counts]:
        """Count into new counts from here on."""
        self.counts = counts = Counts(peak=self.live)
        yield counts
        counts.live = self.live

    def sync(self, what: str) -> None:
        """The host waits for the device."""
        frame: Any = sys._getframe(1)
        while frame and _inside(frame.f_code.co_filename):
            frame = frame.f_back
        name = frame.f_code.co_filename.rpartition("site-packages/")[2] if frame else "?"
        self.counts.syncs[what, f"{os.path.relpath(name) if os.path.isabs(name) else name}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        if kwargs.pop("pin_memory", False):
            return func(*args, **kwargs)  # a buffer for copies from the device, as fake as they are
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and (
            device is None or torch.device(device).type != "cuda"
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name
        if sent := collective(func, args):
            self.counts.calls[sent[0]] += 1
            self.counts.sent[sent[0]] += sent[1]
        on_device = any(is_cuda(tensor) for tensor in tensors)
        if name in ("aten::_local_scalar_dense", "aten::equal"):
            if on_device:
                self.sync(name.removeprefix("aten::_").removeprefix("aten::"))
            return self.answers.item(args[0]) if name != "aten::equal" else False
        if name in ("aten::nonzero", "aten::masked_select"):
            out = self._data_dependent(name, args[0])
        elif name == "bitsandbytes::dequantize_4bit":
            out = _check_dequantize(*args[:3], kwargs.get("out", args[-1]))
        elif name.startswith("c10d::") and name.endswith("_coalesced_"):
            out = FakeWork().boxed()  # torch 2.13 knows no shape function of these; they write their first argument
        else:
            if "_grouped_mm" in name:
                self.counts.grouped[_check_grouped(*args, **kwargs)] += 1
            out = func(*args, **kwargs)
        self._count(func, name, tensors, args, kwargs, out)
        return out

    def _data_dependent(self, name: str, tensor: Tensor) -> Tensor:
        if is_cuda(tensor):
            self.sync(name.removeprefix("aten::"))
        n = self.answers.found(tensor)
        with self.fake:
            if name == "aten::nonzero":
                return torch.empty((n, tensor.dim()), dtype=torch.int64, device=tensor.device)
            return torch.empty(n, dtype=tensor.dtype, device=tensor.device)

    def _count(self, func: Any, name: str, tensors: list[Tensor], args: tuple, kwargs: Any, out: Any) -> None:
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outs:
            self._hold(tensor)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            if waits and source.device.type != outs[0].device.type:
                self.sync(f"copy {source.device.type} to {outs[0].device.type}")
        elif any(is_cuda(tensor) for tensor in tensors + outs):
            hosts = [tensor for tensor in tensors if not is_cuda(tensor) and tensor.dim()]
            assert not hosts, f"{func} mixes tensors of the device with {[tuple(t.shape) for t in hosts]} on the host"
        if not any(is_cuda(tensor) for tensor in tensors + outs) or name in _NOTHING or _is_view(func):
            return
        moves = func.namespace != "c10d"
        size = _bytes(func, name, args, tensors, outs) if moves else 0
        self.counts.ran[name, size, _flops(name, args)] += 1

    def _hold(self, tensor: Tensor) -> None:
        """Add the tensor's memory to what is live, until its storage goes."""
        if not is_cuda(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = self._storages[key] = -(-storage.nbytes() // ALIGNED) * ALIGNED
        self.live += size
        self.counts.peak = max(self.counts.peak, self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._storages.pop(key)


def is_cuda(tensor: Tensor) -> bool:
    """Whether a tensor is on the device. A fake one is dispatched again each time it is asked itself."""
    return tensor.fake_device.type == "cuda" if isinstance(tensor, FakeTensor) else tensor.is_cuda


def _inside(path: str) -> bool:
    return "site-packages/torch/" in path or "support/fake_cuda/" in path or path.startswith("<")


def _tolist(real: Any, watch: Watch) -> Any:
    def tolist(tensor: Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return real(tensor)
        if is_cuda(tensor):
            watch.sync("tolist")
        listed = watch.answers.listed(tensor)
        return listed if tensor.dim() else listed[0]

    return tolist


def _numpy(real: Any, watch: Watch) -> Any:
    def numpy(tensor: Tensor, **kwargs: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return real(tensor, **kwargs)
        assert not is_cuda(tensor)
        return watch.answers.array(tensor)

    return numpy


@functools.cache
def _is_view(func: Any) -> bool:
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)


def _bytes(func: Any, name: str, args: tuple, tensors: list[Tensor], outs: list[Tensor]) -> int:
    if name in _GATHERS:
        return 2 * outs[0].nbytes
    different = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in (*tensors, *outs) if is_cuda(t)
    }.values()
    total = sum(_size(tensor) for tensor in different)
    if _writes(func) and name.removeprefix("aten::") not in _WRITES_ONLY and not func._overloadname.startswith("out"):
        total += sum(_size(tensor) for tensor in tree_leaves(args[0]))  # which it reads as well
    return total


@functools.cache
def _writes(func: Any) -> bool:
    return any(given.alias_info is not None and given.alias_info.is_write for given in func._schema.arguments)


def _size(tensor: Tensor) -> int:
    """Bytes, an expanded dimension once."""
    elements = 1
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= n if step else 1
    return elements * tensor.element_size()


def _flops(name: str, args: tuple) -> int:
    if name == "aten::mm":
        return 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    if name in ("aten::addmm", "aten::addmm_"):
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    if "_grouped_mm" in name:
        return 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
    if name.startswith("megasft::lora_"):
        return _lora_flops(name.removeprefix("megasft::lora_"), args)
    if name.startswith("fake_cuda::attention"):  # two products of half a square for each head, five in backward
        backward = name.endswith("backward")
        q, longest = args[int(backward)], args[-1]
        return (5 if backward else 2) * len(q) * longest * q.shape[1] * q.shape[2]
    return 0


def _lora_flops(name: str, args: tuple) -> int:
    """Of `lora.factors`: rows times inputs or outputs times rank."""
    if name.endswith("_"):  # the same, added to what is given first
        name, args = name[:-1], args[1:]
    if name in ("down", "down_gradient_A", "down_gradient_x"):
        rows, factor = args[1 if name == "down_gradient_A" else 0], args[2 if name.startswith("down_") else 1]
        return 2 * len(rows) * factor.shape[-1] * factor.shape[-2]
    factors = args[1 if name == "up_gradient_h" else 2]
    return 2 * len(args[0]) * sum(b.shape[-1] * b.shape[-2] for b in factors)


def _check_grouped(a: Tensor, b: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> str:
    """Assert what `_grouped_mm` for sm90 demands (torch 2.13, ATen/native/cuda/GroupMM.cu); the layout in words.

    Addresses and strides are multiples of 16 bytes. The dimension along which the groups lie must not be the contiguous
    one, or each group's length would have to be such a multiple too.
    """
    assert a.dtype == b.dtype == torch.bfloat16, f"grouped product of {a.dtype} and {b.dtype}"
    assert offs.dtype == torch.int32
    assert is_cuda(offs)
    assert offs.is_contiguous()
    assert bias is None
    assert a.dim() == 2
    groups = b.shape[0] if b.dim() == 3 else len(offs)
    assert len(offs) == groups
    assert a.shape[1] == b.shape[-2]
    rows = a.shape[0] if b.dim() == 3 else a.shape[1]
    assert rows > 0, "a grouped product without a row"
    for tensor in (a, b):
        assert tensor.data_ptr() % 16 == 0, f"a grouped product's operand {tuple(tensor.shape)} is not aligned"
        inner, outer = sorted(tensor.stride()[-2:])
        assert inner == 1
        assert outer * 2 % 16 == 0, f"stride {outer} of a grouped product's operand {tuple(tensor.shape)}"
    if b.dim() == 3:
        assert a.stride(1) == 1, "the groups lie along the contiguous dimension of a"
        return f"rows x {'column' if b.stride(-2) == 1 else 'row'}-major experts"
    assert a.stride(0) == 1, "the groups lie along the contiguous dimension of a"
    assert b.stride(1) == 1, "the groups lie along the contiguous dimension of b"
    return "sum over rows"


def _check_dequantize(packed: Tensor, scales: Tensor, size: int, out: Tensor) -> None:
    """Assert what bitsandbytes' operator on CUDA demands, whose own shape function cannot run."""
    for tensor, dtype in ((packed, torch.uint8), (scales, torch.float32), (out, out.dtype)):
        assert is_cuda(tensor)
        assert tensor.is_contiguous()
        assert tensor.dtype == dtype
    assert 2 * packed.numel() == out.numel() == scales.numel() * size
    assert out.numel() < 2**31, "bitsandbytes counts weights in an int32"
