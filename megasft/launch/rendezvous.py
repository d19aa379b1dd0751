"""The store where ranks and launcher of one attempt meet, and the number of the attempt where ranks are restarted.

Under `megasft train` the launcher hosts a store for each attempt, at MASTER_ADDR:MASTER_PORT. torchrun hosts one store
for all of its attempts, or none, if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: then rank 0 does. Its restart count is each
node's own and differs between nodes once an agent was restarted or a node came back. And torch 2.13 takes the store to
be new at every attempt (`rendezvous._create_c10d_store`), so restarted ranks would look for each other at the addresses
of dead ones. So the ranks agree on a number here, and prefix all their keys with it.
"""

import functools
import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from megasft.messages import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

JOIN_SECONDS = 600.0  # for all ranks to join; those of one attempt are started together
ANSWER = timedelta(seconds=5)


@functools.cache
def store() -> "Store | None":
    """What launcher and ranks share in this attempt; None without a launcher. Every rank calls it.

    Raises UserError where the others do not join.
    """
    _begin()
    return connection()


def connection(answer: timedelta = ANSWER) -> "Store | None":
    """The same, through a connection of its own whose answers may take this long."""
    prefix, shared = _begin(), connect(answer)
    if shared is None or not prefix:
        return shared
    from torch.distributed import PrefixStore

    return PrefixStore(prefix, shared)


def is_restart() -> bool:
    """Whether the launcher has restarted this run."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def launcher_hosts() -> bool:
    """Whether the launcher hosts the store, so that it exists before the ranks do and outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_here() -> bool:
    """Whether this rank hosts the store, so that it ends with this process."""
    return _is_torchrun() and not launcher_hosts() and os.environ["RANK"] == "0"


def connect(answer: timedelta = ANSWER) -> "Store | None":
    """The store, with the keys of every attempt."""
    if not (launcher_hosts() or _is_torchrun()):
        return None
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS if _is_torchrun() else 20))
    store.set_timeout(answer)
    return store


def _is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@functools.cache
def _begin() -> str:
    """Agree on the attempt, if it is torchrun's; the prefix of its keys."""
    if not _is_torchrun():
        return ""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if is_here():
        _host()
    store = connect()
    assert store is not None
    number, restarts = _agree(store, rank, world, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    return f"megasft/attempt {number}"


@functools.cache
def _host() -> "Store":
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)


def _agree(store: "Store", rank: int, world: int, restarts: int) -> tuple[int, int]:
    """(number of this attempt in this store, how often the ranks were restarted: the most that any of them knows).

    Rank 0 counts, and answers each other rank under a key that this rank made up, so that keys which earlier attempts
    left in the store cannot be mistaken for it.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    if rank:
        name = f"megasft/number for {uuid.uuid4().hex}"
        store.set(f"megasft/rank {rank}", name)
        number = int(_get(store, name, deadline, rank))
        store.set(f"megasft/{number}/rank {rank}", str(restarts))
        return number, int(_get(store, f"megasft/{number}/restarts", deadline, rank))
    number = store.add("megasft/attempts", 1) - 1
    known = {0: max(number, restarts)}
    while len(known) < world:
        for other in set(range(world)) - known.keys():
            key, answer = f"megasft/rank {other}", f"megasft/{number}/rank {other}"
            if store.check([key]):
                store.set(store.get(key).decode(), str(number))
            if store.check([answer]):
                known[other] = int(store.get(answer))
        if len(known) < world:
            _wait(deadline, f"rank 0 for ranks {', '.join(map(str, sorted(set(range(world)) - known.keys())))}")
    store.set(f"megasft/{number}/restarts", str(max(known.values())))
    return number, max(known.values())


def _get(store: "Store", key: str, deadline: float, rank: int) -> bytes:
    while not store.check([key]):
        _wait(deadline, f"rank {rank} for rank 0")
    return store.get(key)


def _wait(deadline: float, who: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(
            f"{who} waited {JOIN_SECONDS / 60:.0f} minutes: was the job launched on all its nodes, and can they reach "
            "each other?"
        )
    time.sleep(0.05)
