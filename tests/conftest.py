import os

# Before torch is imported. The ranks share the cores, and all tests run on CPUs, on a machine with GPUs too: their expected
# numbers are the CPU's, and gloo has no CUDA tensors. `tools/gpu_acceptance.sh` is for GPUs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pathlib import Path

import pytest
import torch

from tests.support.ranks import RankPool

FIRST = ("cuda_path", "parallel", "parity", "faults", "test_front_door.py")  # files that take up to minutes


def pytest_collection_modifyitems(items):
    """Long files first: with several workers that take a file at a time, short ones fill the time that is left at the end."""
    here = Path(__file__).parent
    names = [item.path.relative_to(here).parts[0] for item in items if item.path.is_relative_to(here)]
    if len(names) == len(items):
        order = {name: FIRST.index(name) if name in FIRST else len(FIRST) for name in names}
        items.sort(key=lambda item: order[item.path.relative_to(here).parts[0]])


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n, function, *args)`: run a function on n ranks of the session's pool."""
    return RankPool()


@pytest.fixture
def two_threads():
    """Run torch on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
