"""How a job ends: the exit codes, and one voice among launcher and ranks, so that a reason is given once."""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def say(message: str, details: str = "") -> None:
    """`megasft: message`, on one line of standard error, after `details` of any length."""
    print(f"{details}megasft: {' '.join(message.split())}", file=sys.stderr, flush=True)


def launchers_store() -> "Store | None":
    """The rendezvous store that the launcher of this rank hosts, torchrun or `megasft train`; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))
    store.set_timeout(timedelta(seconds=5))
    return store


def first_to_tell(store: "Store | None", who: str, otherwise: bool = True) -> bool:
    """Whether `who`, a rank or the launcher, is the first in this job to say why it ends: the store remembers it.

    Where there is no store, or none any more, nobody can agree: the answer is `otherwise`.
    """
    if store is None:
        return otherwise
    key = f"megasft/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        return store.compare_set(key, "", who).decode() == who
    except RuntimeError:  # torch.distributed's errors: the launcher is gone
        return otherwise
