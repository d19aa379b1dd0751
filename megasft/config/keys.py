"""Keys of a user's accounts: read from a file into the environment, and kept out of everything that is written."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megasft.messages import UserError

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)", re.ASCII)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # shorter values, such as "false", are words
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/@\s'\"]+@", re.IGNORECASE)  # of https://user:password@host


def load_env_file(path: str | Path) -> None:
    """Set the variables of a file that are not set yet, for this process and those it starts.

    Lines are NAME=VALUE, `export` before them or not, the value in quotes or not; empty lines and those that begin with
    # do not count. Raises UserError, which shows nothing of the file's lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--env-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--env-file {path}: is not UTF-8; its lines are NAME=VALUE") from None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or "\0" in line:
            raise UserError(f"--env-file {path}:{number}: is not NAME=VALUE")
        os.environ.setdefault(found[1], _value(found[2], f"--env-file {path}:{number}"))


def _value(text: str, where: str) -> str:
    if text[:1] in ("'", '"'):
        value, quote, rest = text[1:].partition(text[0])
        if not quote or (rest.strip() and not rest.strip().startswith("#")):
            raise UserError(f"{where}: its value begins with a quote and does not end with it")
        return value
    return re.split(r"\s#", text, maxsplit=1)[0].strip()


def redact(text: str) -> str:
    """The text with *** in place of keys and passwords: those in the environment, and those in addresses."""
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER.sub(r"\1***@", text)


def _secrets() -> Iterator[str]:
    """Values of the variables whose names say that they are secret."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST:
            yield value
