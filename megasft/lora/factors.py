"""The products of LoRA's factors, for one linear layer or for rows sorted by expert: torch's on CPUs, Triton's on CUDA.

    h = s drop(x) A^T        y_n += h_n B_n^T

and their gradients. A has the factors of layers with the same input stacked along the rank; columns[n] of y belong to
B_n, which reads rank columns [n r, (n + 1) r) of h. With `offsets`, int32 [E], rows offsets[e - 1] to offsets[e]
belong to expert e, and A and B have a first dimension E.

On CUDA each function is one or two kernels (`megasft.kernels.factors`): with torch's products, x would be dropped into
a copy, and each result written, read again and added. Sums are in fp32 there, and rounded once.

T rows, K inputs, N outputs, R = rank x number of stacked layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megasft.lora.dropout import Dropout

Columns = Sequence[slice]


def down(x: Tensor, A: Tensor, scaling: float, drop: Dropout | None, offsets: Tensor | None) -> Tensor:
    """h: x [T, K], A [R, K] -> [T, R]."""
    if x.is_cuda:
        return torch.ops.megasft.lora_down(x, A, scaling, *_counters(drop), offsets)
    seen = x if drop is None else drop(x)
    return product(seen, A.transpose(-2, -1), offsets).mul_(scaling)


def add_up(y: Tensor, h: Tensor, B: Sequence[Tensor], columns: Columns, offsets: Tensor | None) -> None:
    """Add h B^T to y [T, N] in place."""
    if y.is_cuda:
        torch.ops.megasft.lora_add_up(y, h, B, _starts(columns), offsets)
        return
    for n, (at, b) in enumerate(zip(columns, B, strict=True)):
        low = h[:, _block(n, b)]
        if offsets is None:
            y[:, at].addmm_(low, b.t())
        else:
            y[:, at].add_(grouped_mm(low, b.transpose(-2, -1), offsets))


def up_gradients(
    gy: Tensor, h: Tensor, B: Sequence[Tensor], columns: Columns, scaling: float, offsets: Tensor | None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor] | list[None]]:  # fmt: skip
    """Of gy [T, N]: s times the gradient of h, which is that of drop(x) A^T [T, R], and the gradients of B.

    On CUDA these are added to `into`, where that is given, and None is returned for them.
    """
    if gy.is_cuda:
        starts = _starts(columns)
        gh = torch.ops.megasft.lora_up_gradient_h(gy, B, starts, scaling, offsets)
        if into is not None:
            torch.ops.megasft.lora_up_gradient_B_(into, gy, h, B, starts, offsets)
            return gh, [None] * len(B)
        return gh, torch.ops.megasft.lora_up_gradient_B(gy, h, B, starts, offsets)
    gh = torch.empty_like(h)
    gB = []
    for n, (at, b) in enumerate(zip(columns, B, strict=True)):
        gh[:, _block(n, b)] = product(gy[:, at], b, offsets)
        gB.append(product(gy[:, at].t(), h[:, _block(n, b)], offsets))
    return gh.mul_(scaling), gB


def down_gradients(
    gx: Tensor | None, gh: Tensor, x: Tensor, A: Tensor, drop: Dropout | None, offsets: Tensor | None,
    into: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The gradient of A, from gh [T, R] of drop(x) A^T; adds that of x to gx [T, K] in place, unless it is None.

    On CUDA it is added to `into`, where that is given, and None is returned.
    """
    if x.is_cuda:
        if gx is not None:
            torch.ops.megasft.lora_down_gradient_x(gx, gh, A, *_counters(drop), offsets)
        if into is not None:
            torch.ops.megasft.lora_down_gradient_A_(into, gh, x, A, *_counters(drop), offsets)
            return None
        return torch.ops.megasft.lora_down_gradient_A(gh, x, A, *_counters(drop), offsets)
    gA = product(gh.t(), x if drop is None else drop(x), offsets)
    if gx is not None:
        if drop is None and offsets is None:
            gx.addmm_(gh, A)
        else:
            added = product(gh, A, offsets)
            gx += added if drop is None else drop(added)
    return gA


def product(a: Tensor, b: Tensor, offsets: Tensor | None) -> Tensor:
    """a times b, or of each expert's rows: see `grouped_mm`."""
    return a @ b if offsets is None else grouped_mm(a, b, offsets)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm`, or a loop over the groups for strides that its kernels do not support.

    Either a [T, K] with groups of rows and b [E, K, N] -> [T, N]; or a [M, T] and b [T, N] with groups along T ->
    [E, M, N]. Groups may be empty. Where all are, no kernel runs: those of CUDA describe a matrix by its rows.
    """
    if not a.numel():
        return a.new_zeros(a.shape[0], b.shape[-1]) if b.dim() == 3 else a.new_zeros(len(offsets), len(a), b.shape[1])
    if _aligned(a) and _aligned(b):
        return torch.nn.functional.grouped_mm(a, b, offs=offsets)
    ends = offsets.tolist()
    spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for e, span in enumerate(spans):
            torch.mm(a[span], b[e], out=out[span])
        return out
    return torch.stack([a[:, span] @ b[span] for span in spans])


def _aligned(tensor: Tensor) -> bool:
    # The grouped kernels load 16 bytes at a time; torch 2.13 refuses unaligned strides and start addresses.
    size = tensor.element_size()
    strides = [step * size for step in tensor.stride() if step != 1]
    return tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in strides)


def _block(n: int, b: Tensor) -> slice:
    """The rank columns of the n-th stacked adapter."""
    r = b.shape[-1]
    return slice(n * r, (n + 1) * r)


def _starts(columns: Columns) -> list[int]:
    return [at.start for at in columns]


def _counters(drop: Dropout | None) -> tuple[Tensor | None, int, int, int]:
    return (None, 0, 0, 0) if drop is None else (drop.counters, drop.key, drop.first, drop.share)


# --- operators on CUDA ------------------------------------------------------------------------------------------------


def _kernel(name: str) -> Any:
    def call(*args: Any) -> Any:
        from megasft.kernels import factors as kernels  # imports Triton, which comes with torch's CUDA builds

        if name in ("up_gradient_B_", "down_gradient_A_"):
            getattr(kernels, name[:-1])(*args[1:], args[0])
            return None
        return getattr(kernels, name)(*args)

    return call


def _nothing(*_: Any) -> None:
    return None


_DROP = "Tensor? counters, int key, int first, int share, Tensor? offsets"
_OPERATORS = {  # what each takes and gives, and its shape
    "down": (
        f"(Tensor x, Tensor A, float scaling, {_DROP}) -> Tensor",
        lambda x, A, *_: x.new_empty(len(x), A.shape[-2]),
    ),
    "add_up": ("(Tensor(a!) y, Tensor h, Tensor[] B, int[] starts, Tensor? offsets) -> ()", _nothing),
    "up_gradient_h": (
        "(Tensor gy, Tensor[] B, int[] starts, float scaling, Tensor? offsets) -> Tensor",
        lambda gy, B, *_: gy.new_empty(len(gy), len(B) * B[0].shape[-1]),
    ),
    "up_gradient_B": (
        "(Tensor gy, Tensor h, Tensor[] B, int[] starts, Tensor? offsets) -> Tensor[]",
        lambda gy, h, B, *_: [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B],
    ),
    "down_gradient_A": (
        f"(Tensor gh, Tensor x, Tensor A, {_DROP}) -> Tensor",
        lambda gh, x, A, *_: torch.empty_like(A, memory_format=torch.contiguous_format),
    ),
    "up_gradient_B_": (
        "(Tensor(a!)[] into, Tensor gy, Tensor h, Tensor[] B, int[] starts, Tensor? offsets) -> ()",
        _nothing,
    ),
    "down_gradient_A_": (f"(Tensor(a!) into, Tensor gh, Tensor x, Tensor A, {_DROP}) -> ()", _nothing),
    "down_gradient_x": (f"(Tensor(a!) gx, Tensor gh, Tensor A, {_DROP}) -> ()", _nothing),
}
_library = torch.library.Library("megasft", "FRAGMENT")
for _name, (_schema, _shape) in _OPERATORS.items():
    _library.define(f"lora_{_name}{_schema}")
    _library.impl(f"lora_{_name}", _kernel(_name), "CUDA")
    _library.impl(f"lora_{_name}", _shape, "Meta")
