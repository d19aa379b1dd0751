"""One rank per node works; the others wait for it without a time limit and end with it."""

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megasft.config.parallelism import resolve_topology
from megasft.config.schema import RunConfig
from megasft.distributed.nodes import on_each_node
from megasft.distributed.topology import regroup
from megasft.messages import UserError

PER_NODE = 2


def outcome(seconds, refused):
    """This rank's result of work that takes `seconds` and fails on rank `refused`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    topology = regroup(resolve_topology(RunConfig().data.topology, world), 0)
    os.environ["LOCAL_RANK"] = str(rank % PER_NODE)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    done = []

    def work():
        done.append(rank)
        time.sleep(seconds)
        if rank == refused:
            raise UserError(f"refused on {rank}")
        return f"made on {rank}"

    try:
        return done, on_each_node(topology, work)
    except UserError as error:
        return done, str(error)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_first_rank_of_each_node_works_and_all_its_ranks_get_the_result(ranks, world):
    expected = [([rank] if rank % PER_NODE == 0 else [], f"made on {rank - rank % PER_NODE}") for rank in range(world)]
    assert ranks(world, outcome, 0, None) == expected


def test_waiting_outlasts_the_timeout_of_collectives(ranks):
    assert [made for _, made in ranks(2, outcome, 4, None)] == ["made on 0"] * 2


@pytest.mark.parametrize("refused", [0, 2])
def test_an_error_on_any_node_ends_every_rank_with_the_same_message(ranks, refused):
    assert {said for _, said in ranks(4, outcome, 0, refused)} == {f"refused on {refused}"}
