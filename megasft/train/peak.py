"""The FLOP/s that a device reaches at most, for the share of it that a step uses (MFU)."""

import statistics
import time
from collections.abc import Callable

import torch

from megasft import host
from megasft.plan.devices import PEAKS

PROBES = ((512, 512, 1024),)  # rows, inputs, outputs
PROBE_SECONDS = 0.02


def gpu_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the GPU of this name; None where it is not in the table, and for other numbers than bf16."""
    if dtype != torch.bfloat16:
        return None
    words = name.replace("-", " ").split()
    fits = (peak for known, peak in PEAKS.items() if set(known.split()) <= set(words))
    return next(fits, None)


def measured_peak(dtype: torch.dtype) -> float | None:
    """FLOP/s of this rank's device: from the table on GPUs, measured in a product on CPUs (60 ms on one core)."""
    if host.CUDA:
        return gpu_peak(host.own_gpu()[0], dtype)
    probe = GemmProbe(dtype, PROBES, PROBE_SECONDS)
    probe.sample()
    return max(probe.rates())


class GemmProbe:
    """This rank's rate of plain matrix products. Sampled between steps, it sees the same disturbances as they do.

    Args:
        shapes: (rows, inputs, outputs) of each product.
        seconds: for which a sample repeats each product, at least once.
        clock: what a product takes is measured with.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shapes: tuple[tuple[int, int, int], ...],
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.shapes, self._duration, self._clock = shapes, seconds, clock
        device = host.device()
        random = torch.Generator(device).manual_seed(0)  # torch's own numbers stay as they are

        def operand(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=dtype, device=device, generator=random)

        self.operands = [(operand(m, k), operand(n, k)) for m, k, n in shapes]
        self.seconds: list[list[float]] = [[] for _ in shapes]
        for x, weight in self.operands:
            x @ weight.t()  # warm up: kernels are initialized on first use

    def sample(self) -> None:
        """Multiply each shape."""
        for (x, weight), seconds in zip(self.operands, self.seconds, strict=True):
            deadline = time.perf_counter() + self._duration
            while True:
                host.synchronize()
                started = self._clock()
                x @ weight.t()
                host.synchronize()
                seconds.append(self._clock() - started)
                if time.perf_counter() > deadline:
                    break

    def rates(self) -> list[float]:
        """Median FLOP/s of each shape."""
        return [2 * m * k * n / statistics.median(s) for (m, k, n), s in zip(self.shapes, self.seconds, strict=True)]
