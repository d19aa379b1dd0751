"""The ranks of an attempt agree on its number, whatever earlier attempts left behind and torchrun's agents count."""

import socket
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


# --- a store of another launch ---


@pytest.fixture
def join(monkeypatch):
    """`join(port, **variables)`: connect as a rank with these variables does."""

    def connect(port, **variables):
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
        monkeypatch.delenv(rendezvous.LAUNCH, raising=False)
        for name, value in (world | variables).items():
            monkeypatch.setenv(name, value)
        for cached in (rendezvous._begin, rendezvous._host):
            cached.cache_clear()
        return rendezvous._begin()

    yield connect
    for cached in (rendezvous._begin, rendezvous._host):
        cached.cache_clear()


def torchrun(folder, nodes="1"):
    return {
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_WORLD_SIZE": nodes, "TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic_{folder}/none_{folder}/attempt_0/1/error.json",
    }  # fmt: skip


def by_megasft(launch):
    return {rendezvous.LAUNCH: launch, "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize("launched", [torchrun, by_megasft])
def test_ranks_refuse_the_store_of_another_launch(server, join, launched):
    join(server.port, **launched("a"))
    join(server.port, **launched("a"))
    with pytest.raises(UserError, match=rf"127.0.0.1:{server.port} is where another job's ranks meet \(launcher: host .*, "
                                        r"process \d+\); end that job, or .* --master-port"):  # fmt: skip
        join(server.port, **launched("b"))


def test_restarted_ranks_and_those_of_other_nodes_are_of_the_same_launch(server, join):
    join(server.port, **torchrun("a"))
    again = torchrun("a")["TORCHELASTIC_ERROR_FILE"].replace("attempt_0", "attempt_1")
    join(server.port, **torchrun("a") | {"TORCHELASTIC_ERROR_FILE": again})
    join(server.port, **torchrun("b", nodes="2"))


def test_a_launcher_refuses_a_store_that_another_claimed(server):
    rendezvous.claim(server, "a", 1)
    with pytest.raises(UserError, match=r"another job's ranks meet \(launcher: host .*, process 1\)"):
        rendezvous.claim(server, "b", 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_process_with_the_number_of_a_rank_is_refused(server, rank, monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 2.0)
    with ThreadPoolExecutor(3) as threads:
        twins = [threads.submit(rendezvous._agree, client(server), rank, 2 + (not rank), 0) for _ in range(2)]
        other = threads.submit(rendezvous._agree, client(server), 0, 2, 0) if rank else None
        refused = [twin.exception() for twin in twins]
        assert any(isinstance(one, UserError) and f"a second rank {rank} came" in str(one) for one in refused)
        assert other is None or other.result() == (0, 0)


def test_a_rank_without_a_store_says_where_it_looked(server, join, monkeypatch):
    monkeypatch.setattr(rendezvous, "LAUNCHER_SECONDS", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(
            UserError, match=f"rank 0 found no store at 127.0.0.1:{port} within 1 seconds: has the launch"
        ):
            join(port, **by_megasft("a"))


def test_a_port_that_is_in_use_is_named(server, join):
    hosted_by_rank_0 = torchrun("a") | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    with pytest.raises(UserError, match=f"127.0.0.1:{server.port}, where the ranks are to meet, is in use by another"):
        join(server.port, **hosted_by_rank_0)
