"""The store where ranks and launcher of one attempt meet, and the number of the attempt where ranks are restarted.

Under `megasft train` the launcher hosts a store for each attempt, at MASTER_ADDR:MASTER_PORT. torchrun hosts one store
for all of its attempts, or none, if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: then rank 0 does. Its restart count is each
node's own and differs between nodes once an agent was restarted or a node came back. And torch 2.13 takes the store to
be new at every attempt (`rendezvous._create_c10d_store`), so restarted ranks would look for each other at the addresses
of dead ones. So the ranks agree on a number here, and prefix all their keys with it.

The port may be one where another job's store listens. The first to come to a store writes there which launch it is of;
ranks of another refuse it. Nodes share no name of their launch: there a rank refuses another process of its number.
"""

import functools
import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megasft.messages import UserError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

JOIN_SECONDS = 600.0  # for all ranks to join; those of one attempt are started together
LAUNCHER_SECONDS = 30.0  # for the launcher's store to answer, which listens before there are ranks
ANSWER = timedelta(seconds=5)
LAUNCH = "MEGASFT_LAUNCH"  # the variable by which the launcher of `megasft train` names the attempt to its ranks


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


def connect(answer: timedelta = ANSWER) -> "TCPStore | None":
    """The store, with the keys of every attempt.

    Raises UserError if it is another launch's, RuntimeError if there is none.
    """
    if not (launcher_hosts() or _is_torchrun()):
        return None
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=LAUNCHER_SECONDS if launcher_hosts() else JOIN_SECONDS)
    store = TCPStore(address, port, is_master=False, timeout=patience)
    store.set_timeout(answer)
    if name := _launch():
        claim(store, name, os.getppid())
    return store


def claim(store: "TCPStore", launch: str, launcher: int) -> None:
    """Write into a store that it is of this launch, whose launcher is this process. Raises UserError if another did."""
    own = f"{launch}\nhost {socket.gethostname()}, process {launcher}"
    found, _, who = store.compare_set("megasft/launch", "", own).decode().partition("\n")
    if found != launch:
        raise UserError(f"{_at(store)} is where another job's ranks meet (launcher: {who}); {_REMEDY}")


_REMEDY = (
    "end that job, or launch this one with another port (of torchrun: --master-port, or the port of --rdzv-endpoint)"
)


def _launch() -> str | None:
    """A name that the ranks of one launch share, and no other launch's; None if they have none, being on several nodes.

    On one node torchrun's agent makes a folder for the logs of its ranks.
    """
    if own := os.environ.get(LAUNCH):
        return own
    log = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/1/error.json
    if not log or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {Path(log).parents[2]}"


def _at(store: "TCPStore") -> str:
    return f"{store.host}:{store.port}"


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@functools.cache
def _begin() -> str:
    """Agree on the attempt, if it is torchrun's; the prefix of its keys."""
    try:
        if is_here():
            _host()
        store = connect()
    except RuntimeError as error:  # torch.distributed's
        raise UserError(_no_store(str(error))) from None
    if store is None or not _is_torchrun():
        return ""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    number, restarts = _agree(store, rank, world, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    return f"megasft/attempt {number}"


@functools.cache
def _host() -> "Store":
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)


def _no_store(error: str) -> str:
    if "EADDRINUSE" in error:
        return f"{_address()}, where the ranks are to meet, is in use by another process; {_REMEDY}"
    seconds = LAUNCHER_SECONDS if launcher_hosts() else JOIN_SECONDS
    return (
        f"rank {os.environ['RANK']} found no store at {_address()} within {seconds:.0f} seconds: has the launcher "
        "ended, or can this node not reach it?"
    )


def _agree(store: "TCPStore", rank: int, world: int, restarts: int) -> tuple[int, int]:
    """(number of this attempt in this store, how often the ranks were restarted: the most that any of them knows).

    Rank 0 counts, and answers each other rank under a key that this rank made up, so that keys which earlier attempts
    left in the store cannot be mistaken for it. Raises UserError if another process has the number of this rank.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    if rank:
        name = f"megasft/number for {uuid.uuid4().hex}"
        store.set(f"megasft/rank {rank}", name)
        while not store.check([name]):
            if store.get(f"megasft/rank {rank}").decode() != name:
                raise UserError(_second(rank, store))
            _wait(deadline, f"rank {rank} for rank 0")
        number = int(store.get(name))
        if store.compare_set(f"megasft/{number}/process of rank {rank}", "", name).decode() != name:
            raise UserError(_second(rank, store))
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
        if store.add("megasft/attempts", 0) != number + 1:
            raise UserError(_second(rank, store))
        if len(known) < world:
            _wait(deadline, f"rank 0 for ranks {', '.join(map(str, sorted(set(range(world)) - known.keys())))}")
    store.set(f"megasft/{number}/restarts", str(max(known.values())))
    return number, max(known.values())


def _second(rank: int, store: "TCPStore") -> str:
    return f"{_at(store)} is where another job's ranks meet, too: a second rank {rank} came; {_REMEDY}"


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
