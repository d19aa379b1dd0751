"""The watchdog names a hanging rank within the time limit and ends all ranks."""

import re
import signal

import pytest

from tests.support.speech import spoken

LIMIT = ["--set", "job.timeout_minutes=0.2", "--set", "hyperparameters.max_steps=100000"]
WHO = r"megasft: no progress for 0.2 minutes \(\[job\] timeout_minutes\): rank 1 \(host \S+, process \d+\)"
WAITING = r"; waiting: rank 0 in \w+ \d+ of \w+"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "finding", "code"),
    [
        (
            "sleep",
            r"hangs in sleep \(misbehave.py:\d+\), step 1, micro batch 1, its last collective \w+ \d+ of \w+",
            1,
        ),
        # It cannot report itself; its launcher kills it.
        (
            "be stopped",
            r"has not reported since step \d+(, micro batch 1)?, its last collective \w+ \d+ of \w+",
            -signal.SIGKILL,
        ),
    ],
)
def test_a_hang_is_reported_with_rank_host_and_last_collective(megasft, world, fault, finding, code):
    # Stopped after some seconds: its reports until then are all that is known of it.
    faults = ["--set", f"tags.fault={fault}", "--set", f"tags.fault_after={1 if fault == 'sleep' else 100}"]
    ended = megasft("train", "--config", str(world / "job.toml"), *faults, *LIMIT, ranks=2)
    (line,) = spoken(ended.said)
    assert re.fullmatch(f"{WHO} {finding}{WAITING}", line), line
    assert ended.codes == [1, code]
