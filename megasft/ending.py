"""How a job ends: the exit codes, and one voice among launcher and ranks, so that a reason is given once."""

import contextlib
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

    from megasft.config import RunConfig

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def say(message: str, details: str = "") -> None:
    """`megasft: message`, on one line of standard error, after `details` of any length."""
    print(f"{details}megasft: {' '.join(message.split())}", file=sys.stderr, flush=True)


def interrupted(config: "RunConfig") -> str:
    """What is said of a training job that was interrupted and could not be saved as it was."""
    return f"interrupted; checkpoints written before are under {config.job.output_dir}"


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
    try:
        return store.compare_set(_key("told"), "", who).decode() == who
    except RuntimeError:  # torch.distributed's errors: the launcher is gone
        return otherwise


def has_been_told(store: "Store | None") -> bool:
    """Whether somebody has said why this job ends."""
    return _is_set(store, "told")


def ask_to_stop(store: "Store | None") -> None:
    """Have every rank save the run and end."""
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(_key("stop"), "1")


def stop_asked(store: "Store | None") -> bool:
    """Whether some rank has asked all to stop."""
    return _is_set(store, "stop")


def _is_set(store: "Store | None", name: str) -> bool:
    with contextlib.suppress(RuntimeError):
        return store is not None and store.check([_key(name)])
    return False


def _key(name: str) -> str:
    """Of this attempt: a job that was restarted has nothing to do with what ended the one before."""
    return f"megasft/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
