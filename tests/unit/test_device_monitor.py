"""What the device and the process say, with a stand-in for NVML, which is only where a driver is; peaks by a GPU's name."""

import math
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from megasft import host
from megasft.train import device_monitor
from megasft.train.device_monitor import NAMES, DeviceMonitor
from megasft.train.peak import GemmProbe, gpu_peak

UUID = "GPU-0"


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """An NVML with one GPU, which is known by its UUID; what is put into `broken` raises."""
    broken = set()

    def answer(name, value):
        def ask(handle, *_):
            assert handle == "handle of GPU-0"
            if name in broken:
                raise NVMLError
            return value

        return ask

    def find(uuid):
        if uuid != UUID or "handle" in broken:
            raise NVMLError
        return f"handle of {uuid}"

    module = SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=find, broken=broken,
        nvmlDeviceGetUtilizationRates=answer("utilization", SimpleNamespace(gpu=87, memory=12)),
        nvmlDeviceGetPowerUsage=answer("power", 612_345), nvmlDeviceGetTemperature=answer("temperature", 61),
        nvmlDeviceGetMemoryInfo=answer("memory_used", SimpleNamespace(used=5 * 10**9)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(host, "own_uuid", lambda: UUID)
    monkeypatch.setattr(device_monitor, "SAMPLE_SECONDS", 1e-3)
    return module


def sampled():
    monitor = DeviceMonitor()
    monitor.start()
    monitor.stop()
    monitor.sample()
    assert monitor.samples >= 1
    assert 0.2 * psutil.Process().memory_info().rss < monitor.rss()
    return dict(zip(NAMES, monitor.values, strict=True))


def test_a_gpu_says_its_numbers_in_the_units_of_the_page(nvml):
    found = sampled()
    assert found.pop("cpu_percent") >= 0
    assert found == {"utilization": 0.87, "power": 612.345, "temperature": 61.0, "memory_used": 5e9}


def test_what_a_gpu_does_not_say_is_not_known_and_the_rest_is(nvml):
    nvml.broken.add("power")
    found = sampled()
    assert math.isnan(found["power"])
    assert found["temperature"] == 61.0
    nvml.broken.add("handle")
    assert all(math.isnan(value) for name, value in sampled().items() if name != "cpu_percent")


def test_without_a_gpu_there_is_the_process_alone():
    found = sampled()
    assert [name for name, value in found.items() if not math.isnan(value)] == ["cpu_percent"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", None), ("NVIDIA A4000", None), ("", None),
    ],
)  # fmt: skip
def test_a_gpu_that_is_in_the_table_has_its_peak_and_no_other_has_one(name, peak):
    assert gpu_peak(name, torch.bfloat16) == peak
    assert gpu_peak(name, torch.float32) is None


def test_the_measured_peak_of_a_cpu_is_a_rate_of_products():
    state = torch.random.get_rng_state()
    probe = GemmProbe(torch.float32, ((64, 64, 64),), 0.01)
    probe.sample()
    (rate,) = probe.rates()
    assert 1e7 < rate < 1e13
    assert torch.random.get_rng_state().equal(state), "the run's random numbers are its own"
