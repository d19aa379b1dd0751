"""Find a model: in a local folder, or by its Hugging Face hub id."""

import functools
import re
from pathlib import Path

from megasft.messages import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--[^/]+?--([^/]+)/snapshots/")  # huggingface_hub's cache
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json"]
_ANSWER_SECONDS = 5.0


def local_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine: `name` if it is a folder, or huggingface_hub's cache of it."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not is_hub_id(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except Exception:  # not in the cache, for whatever reason
        return None


def base_name(name: str) -> str:
    """The last part of a model's folder or hub id, in lower case: `qwen3-30b-a3b` of all that hold or name it."""
    cached = _CACHED.search(name)
    return (cached[1] if cached else Path(name).name).lower()


def find_model(name: str) -> Path:
    """The folder of a model: `name` if it is a folder; otherwise huggingface_hub's cache, downloading it if needed.

    Raises UserError if there is none; without a network, within seconds.
    """
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _from_hub(name)


@functools.cache  # a process asks several times on the way of one job
def _from_hub(name: str) -> Path:
    check_name(name)
    if cached := local_folder(name):
        return cached
    from huggingface_hub import HfApi, snapshot_download

    try:
        # snapshot_download (huggingface_hub 2.4) has no timeout here, so first check that the hub answers.
        HfApi().model_info(name, timeout=_ANSWER_SECONDS)
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # network, authorisation, spelling: the hub's client raises many kinds
        reason = (str(error).strip() or "no answer").splitlines()[0]
        raise UserError(
            f"[job] model = {name!r}: not a folder, not in huggingface_hub's cache, and the download from the hub "
            f"failed ({type(error).__name__}: {reason}); set the path of a model folder, or download the model where "
            "there is a network"
        ) from None


def check_name(name: str) -> None:
    """Raise UserError if `name` can be neither a folder nor a hub id."""
    if not (Path(name).expanduser().is_dir() or is_hub_id(name)):
        raise UserError(f"[job] model = {name!r}: no such folder, and not a hub id (owner/name)")


def is_hub_id(name: str) -> bool:
    """Whether `name` is spelled as owner/name."""
    return _HUB_ID.fullmatch(name) is not None
