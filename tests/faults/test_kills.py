"""A run killed at any moment loses nothing: a few kills; `python -m tests.faults.kills` runs more."""

from tests.faults.kills import ANY_TIME, MOMENTS, START, survive


def test_killed_runs_end_with_the_results_of_an_uninterrupted_run(tmp_path):
    survived = survive(tmp_path, 6, seed=7, topologies=["TP=2"], moments=[*MOMENTS, START, ANY_TIME], say=print)
    assert survived.total() == 6
