import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the ranks share the cores

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n, function, *args)`: run a function on n ranks of the session's pool."""
    return RankPool()
