"""What NVML and the operating system say of this rank's device and process, sampled in the background."""

import contextlib
import math
import threading
from typing import Any

import psutil

from megasft import host

SAMPLE_SECONDS = 2.0
NAMES = ("utilization", "power", "temperature", "memory_used", "cpu_percent")


class DeviceMonitor:
    """Samples in a thread from `start` to `stop`, since NVML may take milliseconds to answer.

    Attributes:
        samples: taken so far.
        values: of the last one, in the order of NAMES; NaN where not known.
    """

    def __init__(self) -> None:
        self.samples, self.values = 0, [math.nan] * len(NAMES)
        self._process = psutil.Process()
        self._process.cpu_percent()  # measured from one call to the next
        self._nvml: tuple[Any, Any] | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Find the device and begin to sample."""
        self._nvml = _nvml()
        threading.Thread(target=self._run, name="device monitor", daemon=True).start()

    def stop(self) -> None:
        """Sample no more; a second call does nothing."""
        self._stopped.set()

    def rss(self) -> int:
        """Resident memory of this process in bytes."""
        return self._process.memory_info().rss

    def sample(self) -> None:
        """Take one now."""
        with self._lock:
            values = dict.fromkeys(NAMES, math.nan) | {"cpu_percent": self._process.cpu_percent()}
            if self._nvml is not None:
                nvml, handle = self._nvml
                for name, ask in {
                    "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                    "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                    "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                    "memory_used": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
                }.items():
                    with contextlib.suppress(nvml.NVMLError):
                        values[name] = float(ask())
            self.samples, self.values = self.samples + 1, list(values.values())

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.sample()


def _nvml() -> tuple[Any, Any] | None:
    """(NVML, the handle of this rank's GPU), which it knows by its UUID whatever CUDA_VISIBLE_DEVICES says; None where
    there is no GPU or no NVML.
    """
    if (uuid := host.own_uuid()) is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None
