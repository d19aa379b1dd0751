"""This rank's optimizer states as rectangles of the full adapter tensors: into a file, and from any set of files.

The distributed optimizer cuts the flattened parameters of a rank into equal shares wherever the cut falls, and the
parameters stack the factors of several linear layers. In a checkpoint each state is a rectangle of one factor under
that factor's own name, such as

    exp_avg/model.layers.0.mlp.experts.7.up_proj.lora_A.weight[0:16,0:2048]

in an ordinary safetensors file, so that any number of ranks in any topology finds what it needs. Where several
tensor-parallel ranks hold the same factor, the first writes it.
"""

import bisect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megasft import host
from megasft.messages import UserError
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.storage.safetensors import TensorFile, TensorSpec, header, write_new
from megasft.storage.shards import Shard
from megasft.train.optimizer import STATES, Owned, make_moments, owned

Span = tuple[int, int]  # of rows or columns: first, end
Rectangle = tuple[Span, Span]

_KEY = re.compile(r"(?P<state>\w+)/(?P<name>.+)\[(?P<r0>\d{1,9}):(?P<r1>\d{1,9}),(?P<c0>\d{1,9}):(?P<c1>\d{1,9})\]")


@dataclass(frozen=True)
class Piece:
    """A rectangle of the factor `name`; its element (i, j) is `flat[offset + i * stride + j]` of what a rank owns."""

    name: str
    rectangle: Rectangle
    offset: int
    stride: int
    first: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        (r0, r1), (c0, c1) = self.rectangle
        return r1 - r0, c1 - c0

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle as a view of what the rank owns of the parameter."""
        return flat.as_strided(self.shape, (self.stride, 1), flat.storage_offset() + self.offset)

    def key(self, state: str) -> str:
        """Its name in a file."""
        (r0, r1), (c0, c1) = self.rectangle
        return f"{state}/{self.name}[{r0}:{r1},{c0}:{c1}]"


class OptimizerShards:
    """This rank's optimizer states: copied and written to a file, or read from the files of any topology.

    Attributes:
        written: parts of files that `write` has written so far.
    """

    def __init__(self, model: Qwen3Moe, optimizer: MegatronOptimizer) -> None:
        self.written = 0
        self._model, self._optimizer = model, optimizer
        shards = sorted(model.adapter_shards(), key=_address)
        self._pieces = [(part, pieces(part, shards)) for part in owned(optimizer)]
        self._copies = [
            {name: torch.zeros(part.end - part.start, pin_memory=host.CUDA) for name in STATES}
            for part, _ in self._pieces
        ]
        self._header: bytes = b""

    def copy(self) -> None:
        """Copy the states to host buffers; `write` writes these while training continues."""
        with host.copying():
            for part, copies in zip(owned(self._optimizer), self._copies, strict=True):
                for name, state in part.states.items():
                    copies[name].copy_(state.view(-1), non_blocking=True)

    def write(self, path: Path) -> str:
        """Write the copy to `path` and flush it to disk; returns its SHA-256. Raises OSError."""
        written = [
            (state, piece, copies[state])
            for state in STATES
            for (_, parts), copies in zip(self._pieces, self._copies, strict=True)
            for piece in parts
            if piece.first
        ]
        if not self._header:
            self._header = header({p.key(state): TensorSpec(torch.float32, p.shape) for state, p, _ in written})
        return write_new(path, self._header, self._counted(_runs((piece, source) for _, piece, source in written)))

    def _counted(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            yield part
            self.written += 1

    def load(self, files: Iterable[Path], adam_steps: int) -> None:
        """Fill weights, master weights and moments of this rank from a checkpoint's files.

        Raises UserError where something is missing.
        """
        saved = SavedShards(files)
        make_moments(self._optimizer, adam_steps)
        for shard in self._model.adapter_shards():
            rows, columns = shard.index
            saved.fill(shard.local, "master", shard.name, ((rows.start, rows.stop), (columns.start, columns.stop)))
        for part, (_, parts) in zip(owned(self._optimizer), self._pieces, strict=True):
            for state, tensor in part.states.items():
                flat = tensor.view(-1)
                if state != "master" or part.parameter.dtype != torch.float32:  # whose master weights are the weights
                    flat.zero_()  # elements of no factor are padding, and always zero
                    for piece in parts:
                        saved.fill(piece.of(flat), state, piece.name, piece.rectangle)


def pieces(part: Owned, shards: list[Shard]) -> list[Piece]:
    """A rank's share of a parameter as rectangles: of each factor the full rows, and a partial row at each end.

    Args:
        shards: the rank's, in the order of their addresses.
    """
    found: list[Piece] = []
    weights = part.parameter.data
    begin, size = weights.data_ptr(), weights.element_size()
    first = bisect.bisect_left(shards, begin, key=_address)
    last = bisect.bisect_left(shards, begin + weights.numel() * size, key=_address)
    for shard in shards[first:last]:
        found.extend(_owned_of(shard, (_address(shard) - begin) // size, part.start, part.end))
    return found


def _address(shard: Shard) -> int:
    return shard.local.data_ptr()


def _owned_of(shard: Shard, at: int, start: int, end: int) -> Iterator[Piece]:
    """Rectangles of a shard that starts at element `at` of the flattened parameter, within start:end."""
    rows, columns = shard.local.shape
    stride = int(shard.local.stride(0)) if rows > 1 else columns
    first = max(0, -(-(start - at - columns + 1) // stride))
    last = min(rows - 1, (end - 1 - at) // stride)
    if first > last:
        return
    head, tail = max(0, start - at - first * stride), min(columns, end - at - last * stride)
    (r0, c0) = (axis.start for axis in shard.index)

    def piece(i0: int, i1: int, j0: int, j1: int) -> Piece:
        rectangle = ((r0 + i0, r0 + i1), (c0 + j0, c0 + j1))
        return Piece(shard.name, rectangle, at + i0 * stride + j0 - start, stride, shard.first)

    if first == last:
        if head < tail:
            yield piece(first, first + 1, head, tail)
        return
    if head:
        if head < columns:
            yield piece(first, first + 1, head, columns)
        first += 1
    if tail < columns:
        if tail > 0:
            yield piece(last, last + 1, 0, tail)
        last -= 1
    if first <= last:
        yield piece(first, last + 1, 0, columns)


def _runs(written: Iterable[tuple[Piece, Tensor]]) -> Iterator[Tensor]:
    """The pieces in order, those adjacent in memory joined."""
    flat, start, end = torch.empty(0), 0, 0
    for piece, source in written:
        rows, columns = piece.shape
        joined = piece.stride == columns or rows == 1
        if joined and source is flat and piece.offset == end:
            end += rows * columns
            continue
        if end > start:
            yield flat[start:end]
        flat, start, end = source, piece.offset, piece.offset + rows * columns
        if not joined:
            yield piece.of(source).contiguous().view(-1)
            end = start
    if end > start:
        yield flat[start:end]


class SavedShards:
    """The rectangles in a checkpoint's files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._found: dict[tuple[str, str], list[tuple[Rectangle, TensorFile, str]]] = {}
        for path in files:
            file = TensorFile(path)
            for key, spec in file.specs.items():
                match = _KEY.fullmatch(key)
                r0, r1, c0, c1 = (int(match[group]) for group in ("r0", "r1", "c0", "c1")) if match else (0,) * 4
                if match is None or spec != TensorSpec(torch.float32, (r1 - r0, c1 - c0)):
                    raise UserError(f"{path}: tensor {key[:200]!r} does not belong to an optimizer")
                self._found.setdefault((match["state"], match["name"]), []).append((((r0, r1), (c0, c1)), file, key))

    def shapes(self, state: str) -> dict[str, tuple[int, int]]:
        """Rows and columns of each factor."""
        shapes: dict[str, tuple[int, int]] = {}
        for name, ((_, r1), (_, c1)), _ in self.of(state):
            rows, columns = shapes.get(name, (0, 0))
            shapes[name] = (max(rows, r1), max(columns, c1))
        return shapes

    def of(self, state: str) -> Iterator[tuple[str, Rectangle, Tensor]]:
        """All rectangles of a state: factor, rectangle, values."""
        for (kind, name), places in self._found.items():
            if kind == state:
                yield from ((name, rectangle, file.tensor(key)) for rectangle, file, key in places)

    def fill(self, out: Tensor, state: str, name: str, wanted: Rectangle) -> None:
        """Copy the rectangle `wanted` of a factor's state to `out`."""
        out.fill_(math.nan)  # shows what is missing, however the rectangles lie
        for (rows, columns), file, key in self._found.get((state, name), ()):
            r, c = _common(rows, wanted[0]), _common(columns, wanted[1])
            if r[0] < r[1] and c[0] < c[1]:
                source = file.tensor(key)[_within(r, rows), _within(c, columns)]
                if not source.isfinite().all():
                    raise UserError(f"{file.path}: {key} holds values that are not finite")
                out[_within(r, wanted[0]), _within(c, wanted[1])] = source.to(out.device, out.dtype)
        if out.isnan().any():
            raise UserError(f"the checkpoint lacks parts of {state} of {name!r}")


def _common(one: Span, other: Span) -> Span:
    return max(one[0], other[0]), min(one[1], other[1])


def _within(span: Span, whole: Span) -> slice:
    return slice(span[0] - whole[0], span[1] - whole[0])
