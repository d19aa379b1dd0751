"""The watchdog's verdict on a hang, given the ranks' reports."""

from dataclasses import replace

import pytest

from megasft.launch.watchdog import Report, judge

LIMIT = 600.0
MOVES = Report(
    number=7, host="b", process=42, idle=3.0, excused=False, ended=False, doing="step 12", last="all_reduce 812 of DP",
    waits_in="", place="train_step (trainer.py:190)",
)  # fmt: skip
WAITS = replace(MOVES, host="a", idle=620.0, waits_in="all_gather 30 of TP", place="")
SLEEPS = replace(MOVES, idle=650.0, place="sleep (job.py:3)")
READS = replace(MOVES, idle=5000.0, excused=True, doing="reading data and weights")
ENDED = replace(MOVES, idle=900.0, ended=True)
SILENT = replace(MOVES, idle=0.5, last="all_reduce 811 of DP")


@pytest.mark.parametrize("moving", [MOVES, READS], ids=["trains", "prepares data"])
def test_no_rank_is_named_while_another_makes_progress(moving):
    assert judge({0: WAITS, 1: WAITS, 2: moving}, [], LIMIT) is None


def test_the_rank_that_is_in_no_collective_is_named_and_where_the_others_wait():
    assert judge({0: WAITS, 1: SLEEPS, 2: WAITS, 3: ENDED}, [], LIMIT) == (
        "no progress for 10 minutes ([job] timeout_minutes): rank 1 (host b, process 42) hangs in sleep (job.py:3), "
        "step 12, its last collective all_reduce 812 of DP; waiting: ranks 0, 2 in all_gather 30 of TP"
    )


@pytest.mark.parametrize("others", [WAITS, READS], ids=["wait", "read data"])
def test_a_rank_that_stopped_reporting_is_named_whatever_it_reported_last(others):
    verdict = judge({0: others, 1: SILENT, 2: None}, [1, 2], LIMIT)
    assert verdict is not None
    assert "rank 1 (host b, process 42) has not reported since step 12, its last collective all_reduce 811" in verdict
    assert "rank 2 never started" in verdict


def test_a_silent_rank_is_not_named_while_another_still_trains():
    assert judge({0: MOVES, 1: SILENT}, [1], LIMIT) is None


def test_if_all_ranks_wait_none_is_blamed():
    other = replace(WAITS, waits_in="recv (job.py:9)")
    verdict = judge({0: WAITS, 1: other}, [], LIMIT)
    assert verdict is not None
    assert verdict.endswith(
        "all ranks wait for each other; waiting: rank 0 in all_gather 30 of TP; rank 1 in recv (job.py:9)"
    )
