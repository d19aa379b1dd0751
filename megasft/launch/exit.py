"""How a job ends: exit codes, and agreement between launcher and ranks on who reports the reason."""

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

    from megasft.config.schema import RunConfig

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
_REPORTED, _STOP, _DONE = "megasft/reported", "megasft/stop", "megasft/done"
_ANSWER_SECONDS = 5.0


def interrupted(config: "RunConfig") -> str:
    """The message of a training job that was interrupted and could not be saved."""
    return f"interrupted; checkpoints written before are under {config.job.output_dir}"


def first_to_report(store: "Store | None", who: str, otherwise: bool = True) -> bool:
    """Whether `who`, a rank or the launcher, is the first to report why this job ends; the store decides.

    Returns `otherwise` where there is no store, or it does not answer.
    """
    if store is None:
        return otherwise
    return _within(_ANSWER_SECONDS, lambda: store.compare_set(_REPORTED, "", who).decode() == who, otherwise)


def was_reported(store: "Store | None") -> bool:
    """Whether a rank or the launcher has reported why this job ends."""
    return store is not None and _within(_ANSWER_SECONDS, lambda: store.check([_REPORTED]), False)


def ask_to_stop(store: "Store | None") -> None:
    """Ask every rank to save the run and end."""
    if store is not None:
        _within(_ANSWER_SECONDS, lambda: store.set(_STOP, "1"), None)


def stop_asked(store: "Store") -> bool:
    """Whether some rank has asked all to stop. Raises RuntimeError if the store does not answer."""
    return store.check([_STOP])


def tell_done(store: "Store | None") -> None:
    """Tell the other ranks that this one is done, and so that nothing is left of the job but to exit."""
    if store is not None:
        _within(_ANSWER_SECONDS, lambda: store.set(_DONE, "1"), None)


def is_done(store: "Store | None") -> bool:
    """Whether some rank has told so."""
    return store is not None and _within(_ANSWER_SECONDS, lambda: store.check([_DONE]), False)


def _within[T](seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """The result of `call`; `otherwise` if it fails or takes too long, as on a store that is cut off."""
    answers = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # torch.distributed's errors: the launcher is gone
            answers.append(call())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
