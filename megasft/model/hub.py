"""Where a model is: a local folder, or a Hugging Face hub id."""

import functools
import re
from pathlib import Path

from megasft.messages import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json"]
_ANSWER_SECONDS = 5.0


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself if it is one; otherwise from huggingface_hub's cache, or fetched into it.

    Raises UserError if it cannot be had, within seconds if there is no network.
    """
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _from_hub(name)


@functools.cache  # a process asks several times on the way of one job
def _from_hub(name: str) -> Path:
    check_name(name)
    from huggingface_hub import HfApi, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except Exception:  # not in the cache: whatever the reason, the hub is asked next
        pass
    try:
        # huggingface_hub 2.4: snapshot_download asks the same without a time limit, so only where there is an answer.
        HfApi().model_info(name, timeout=_ANSWER_SECONDS)
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # network, authorisation, spelling: the hub's client raises many kinds
        reason = (str(error).strip() or "no answer").splitlines()[0]
        raise UserError(
            f"[job] model = {name!r}: not a folder, not in huggingface_hub's cache, and the hub did not give it "
            f"({type(error).__name__}: {reason}); give the path of a model folder, or fetch it where there is a network"
        ) from None


def check_name(name: str) -> None:
    """Raise UserError if `name` can be neither a folder nor a hub id."""
    if Path(name).expanduser().is_dir() or (_HUB_ID.fullmatch(name) and not name.startswith(".")):
        return
    raise UserError(f"[job] model = {name!r}: no such folder, and not a hub id (owner/name)")
