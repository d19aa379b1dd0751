"""Read and write safetensors files in place, including files larger than memory.

A tensor is a view of the memory-mapped file: only touched pages occupy memory, and `release` frees them. A file is 8
bytes of header length, a JSON header and the tensors (https://github.com/huggingface/safetensors#format).
"""

import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasft.messages import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
RELEASE_BYTES = 64 * 2**20  # a reader of many tensors calls `release` after touching this many bytes
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Type and shape of a tensor, from the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file opened for reading. Raises UserError if it is missing, corrupted or has unknown dtypes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks the header against the format and the file's length
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
                # A private mapping: torch needs writable memory, and the file must not change.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: corrupted or not a safetensors file ({error})") from None
        header.pop("__metadata__", None)
        unknown = next((name for name, entry in header.items() if entry["dtype"] not in DTYPES), None)
        if unknown:
            dtype = header[unknown]["dtype"]
            raise UserError(f"{path}: tensor {unknown!r} has dtype {dtype}; megasft reads {', '.join(DTYPES)}")
        self.specs = {name: TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
        self.offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the file; its data is read on first use."""
        return _view(self._map, self.specs[name], self.offsets[name])

    def release(self) -> None:
        """Free the memory of the pages read so far."""
        self._map.madvise(mmap.MADV_DONTNEED)


class TensorFileWriter:
    """A safetensors file with the given tensors, initially zero, to write in place. Disk space is reserved up front.

    Raises OSError, such as "No space left on device".
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.specs, self.offsets = dict(specs), {}
        begin = header(specs)
        end = len(begin)
        for name, spec in specs.items():
            self.offsets[name] = end
            end += spec.nbytes
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (until close)
        # Without this, a full disk would kill the process with a bus error on the first page it cannot allocate.
        os.posix_fallocate(self._file.fileno(), 0, end)
        self._file.write(begin)
        self._map = mmap.mmap(self._file.fileno(), 0)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the file: writing to it writes to the file."""
        return _view(self._map, self.specs[name], self.offsets[name])

    def write(self, name: str, index: tuple[int | slice, ...], value: Tensor) -> None:
        """`tensor(name)[index] = value` for a contiguous slice: several times as fast, because no page faults."""
        full = self.tensor(name)
        offset = full[index].data_ptr() - full.data_ptr()
        assert full[index].is_contiguous(), index
        data = value.to(full.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        os.pwrite(self._file.fileno(), data, self.offsets[name] + offset)

    def release(self) -> None:
        """Free the memory of the pages written so far; the operating system writes them to the file."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Flush to disk."""
        self._map.flush()
        self._file.close()


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A sum is not finite if a value is not, and is formed at 10 GB/s and core; `isfinite` makes 0.2. So only where the
    sum is not finite, which finite values may overflow to, is each value looked at.
    """
    values = values.float() if values.dtype.itemsize == 1 else values
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def header(specs: Mapping[str, TensorSpec]) -> bytes:
    """The bytes that precede the tensors in a safetensors file. The tensors follow in this order without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        end = at + spec.nbytes
        entries[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_new(path: Path, begin: bytes, tensors: Iterable[Tensor]) -> str:
    """Write a new file of `begin` and `tensors`, flush it to disk and return its SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    data: Any
    with open(path, "xb", buffering=0) as file:
        for data in itertools.chain([begin], (tensor.view(-1).view(torch.uint8).numpy().data for tensor in tensors)):
            digest.update(data)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _view(mapping: mmap.mmap, spec: TensorSpec, offset: int) -> Tensor:
    count = math.prod(spec.shape)
    if not count:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(mapping, dtype=spec.dtype, count=count, offset=offset).view(spec.shape)
