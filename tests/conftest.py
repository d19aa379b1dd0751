import os

# Before torch is imported. The ranks share the cores, and all tests run on CPUs, on a machine with GPUs too: their expected
# numbers are the CPU's, and gloo has no CUDA tensors. `tools/gpu_acceptance.sh` is for GPUs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from tests.support.ranks import RankPool


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
