"""How a job ends: the exit codes, and one voice among launcher and ranks, so that a reason is given once."""

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

    from megasft.config.schema import RunConfig

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
_TOLD, _STOP = "megasft/told", "megasft/stop"
_ANSWER_SECONDS = 5.0


def interrupted(config: "RunConfig") -> str:
    """What is said of a training job that was interrupted and could not be saved as it was."""
    return f"interrupted; checkpoints written before are under {config.job.output_dir}"


def first_to_tell(store: "Store | None", who: str, otherwise: bool = True) -> bool:
    """Whether `who`, a rank or the launcher, is the first in this job to say why it ends: the store remembers it.

    Where there is no store, or none any more, nobody can agree: the answer is `otherwise`.
    """
    if store is None:
        return otherwise
    return _within(_ANSWER_SECONDS, lambda: store.compare_set(_TOLD, "", who).decode() == who, otherwise)


def has_been_told(store: "Store | None") -> bool:
    """Whether somebody has said why this job ends."""
    return store is not None and _within(_ANSWER_SECONDS, lambda: store.check([_TOLD]), False)


def ask_to_stop(store: "Store | None") -> None:
    """Have every rank save the run and end."""
    if store is not None:
        _within(_ANSWER_SECONDS, lambda: store.set(_STOP, "1"), None)


def stop_asked(store: "Store") -> bool:
    """Whether some rank has asked all to stop. Raises RuntimeError if the store does not answer."""
    return store.check([_STOP])


def _within[T](seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """What `call` gives, `otherwise` if it fails or does not return in so long: a store that is cut off may hang."""
    answers = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # torch.distributed's errors: the launcher is gone
            answers.append(call())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
