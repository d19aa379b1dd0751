"""`best/`: the adapter of the best validation loss, with a label that says of which step and on which data."""

import contextlib
import json
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasft.messages import UserError
from megasft.train.checkpoint.folder import RunState, write_text

if TYPE_CHECKING:  # resuming is checked before torch and megatron-core are imported
    from megasft.data.dataset import Mix

BEST = "best"
_OF = "validation.json"  # in best/: the step and the data of the validation it was best in


def label_best(folder: Path, step: int, validation: "Mix") -> None:
    """Note in `best/` which validation it is of. Raises UserError."""
    try:
        write_text(folder / _OF, json.dumps({"step": step, "content": _content(validation)}))
    except OSError as error:
        raise UserError(f"{folder / _OF}: cannot be written ({error.strerror})") from None


def best_stands(output_dir: Path, state: RunState, validation: "Mix") -> bool:
    """Whether `best/` is of a state's best validation and of these data: a later validation may have replaced it."""
    return _label(output_dir / BEST) == {"step": state.best_step, "content": _content(validation)}


def _content(validation: "Mix") -> list[Any]:
    # Samples that were made in memory have no digest.
    return [zlib.crc32(validation.lengths.tobytes()), *(source.digest for source in validation.sources)]


def _label(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / _OF).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def step_of_best(folder: Path) -> float:
    """The step whose validation `best/` is of; infinity where it does not say."""
    step = _label(folder).get("step")
    return step if isinstance(step, int) else math.inf
