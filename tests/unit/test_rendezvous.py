"""The ranks of an attempt agree on its number, whatever earlier attempts left behind and torchrun's agents count."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megasft.launch import rendezvous
from megasft.messages import UserError


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 10.0)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server):
    store = TCPStore("127.0.0.1", server.port, is_master=False)
    store.set_timeout(timedelta(seconds=5))
    return store


def agree(server, counts, order):
    """What each rank learns if the agents count `counts` restarts and the ranks join in this order."""
    with ThreadPoolExecutor(len(counts)) as ranks:
        asked = {
            rank: ranks.submit(rendezvous._agree, client(server), rank, len(counts), counts[rank]) for rank in order
        }
        return [asked[rank].result() for rank in range(len(counts))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_every_attempt_has_one_number_on_all_ranks(server, order):
    assert agree(server, (0, 0, 0), order) == [(0, 0)] * 3
    # A node came back: its agent counts anew, the others' do not count at all.
    assert agree(server, (0, 1, 0), order) == [(1, 1)] * 3
    assert agree(server, (0, 0, 0), order) == [(2, 2)] * 3


def test_on_a_new_store_the_highest_count_identifies_a_restart(server):
    assert agree(server, (0, 2, 1), (0, 1, 2)) == [(0, 2)] * 3


def test_a_rank_that_never_joins_is_named(server, monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.3)
    with pytest.raises(
        UserError, match=r"rank 0 for ranks 1, 2 waited .* minutes: was the job launched on all its nodes"
    ):
        rendezvous._agree(client(server), 0, 3, 0)
