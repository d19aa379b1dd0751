import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the ranks share the cores

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
