"""The reference job at its true size: 48 layers, 4,096 tokens, TP=2 x DP=2, on a rank of fake GPUs."""

import pytest

from megasft.config.parallelism import TopologySizes
from tests.cuda_path.cases import FULL, in_a_process
from tests.cuda_path.formulas import frozen_bytes
from tests.parallel.step_traffic import StepTraffic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("walk") / "counts", FULL.name)[FULL.name]


def test_a_micro_batch_launches_and_waits_no_more_than_committed(walked):
    """The figures of docs/gpu.md."""
    assert not walked.error
    counts = walked.phases["compute"]
    assert counts.kernels.total() <= 15_572
    assert [(what, where.partition(":")[0]) for what, where in counts.syncs] == [
        ("copy cuda to cpu", "megasft/train/forward_backward.py")
    ]


def test_memory_is_what_the_formulas_say_and_leaves_room_on_a_card_of_80_gb(walked):
    sizes = TopologySizes(2, 1, 2, 1, 2)
    config = FULL.config()
    dense, _, experts, _ = StepTraffic(config, sizes, 0, 16, "allgather").adapters()
    routers = 16 * (config.num_experts + config.hidden_size) * config.num_hidden_layers  # counted, but not adapted here
    adapters = sum(dense) + sum(experts) - routers
    assert walked.state["frozen"] == frozen_bytes(config, sizes, 0, False)[0]
    assert walked.state["adapters"] == 2 * adapters
    assert walked.state["gradient buffers"] == pytest.approx(4 * adapters, rel=1e-5)
    assert walked.state["optimizer"] == pytest.approx(12 * adapters / 2, rel=1e-4)
    assert walked.phases["compute"].peak < 39.5 * 2**30
