"""Where a model is: a local folder, or a Hugging Face hub id."""

import re
from pathlib import Path

from megasft.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json"]


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself if it is one; otherwise from huggingface_hub's cache, or fetched into it.

    Raises UserError if it cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(f"[job] model = {name!r}: neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except Exception:  # not in the cache: whatever the reason, the hub is asked next
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # network, authorisation, spelling: the hub's client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"[job] model = {name!r}: not a folder, not in huggingface_hub's cache, and the hub did not give it ({reason})"
        ) from None
