"""Released models at their true sizes on a rank of fake GPUs; the reference job with 4,096 tokens, TP=2 x DP=2."""

import pytest

from megasft.plan.memory import memory
from megasft.plan.state import state_bytes
from megasft.plan.time import KERNELS
from tests.cuda_path.cases import FULL, SHAPES, in_a_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("walk") / "counts", FULL.name)[FULL.name]


def test_a_micro_batch_launches_moves_and_waits_as_committed(walked):
    """The figures of docs/gpu.md."""
    assert not walked.error
    counts = walked.phases["compute"]
    assert counts.kernels.total() == 5_510
    assert round(counts.bytes.total() / 1e9) == 378
    # By which the plan counts launches of the layers; embedding, head and sums are 230 more, 4 %.
    assert 48 * sum(KERNELS[False]) == pytest.approx(counts.kernels.total() - 230, rel=0.01)
    assert [(what, where.partition(":")[0]) for what, where in counts.syncs] == [
        ("copy cuda to cpu", "megasft/train/forward_backward.py")
    ]


def test_state_is_what_the_plan_says_to_the_byte(walked):
    assert walked.state == state_bytes(FULL.job())


def test_the_peak_is_within_5_percent_of_the_plan(walked):
    assert memory(FULL.job()).peak == pytest.approx(walked.peak, rel=0.05)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("walk") / "shapes", *(case.name for case in SHAPES))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_state_of_released_models_is_what_the_plan_says_to_the_byte(shapes, case):
    found = shapes[case.name]
    assert not found.error, found.error
    assert found.state == state_bytes(case.job())
