"""Output for the user: errors that the user can fix, lines on standard error, and silence of other libraries."""

import functools
import logging
import os
import sys
import warnings


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file:line, key) and what would work.

    The command line prints the line and exits with code 2; nothing else in megasft does that.
    """


def say(message: str, details: str = "") -> None:
    """Print `details` of any length, then the line `megasft: message`, on standard error."""
    from megasft.config.keys import redact

    print(redact(f"{details}megasft: {' '.join(message.split())}"), file=sys.stderr, flush=True)


@functools.cache  # ranks are forked from the process that checks the job, and check it again
def warn(line: str) -> None:
    """Print a line on standard error on rank 0 only, and no second time."""
    say_once(line)


def size(nbytes: int) -> str:
    """A number of bytes as text: 3.2 GB, 41.0 kB."""
    unit, name = next(((n, name) for n, name in ((10**9, "GB"), (10**6, "MB")) if nbytes >= n), (10**3, "kB"))
    return f"{nbytes / unit:.1f} {name}"


def say_once(line: str) -> None:
    """Print a line on standard error on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def quieten_libraries() -> None:
    """Silence what libraries tell their developers, on import and later."""
    warnings.filterwarnings("ignore", module=r"(.*/)?megatron[./]")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
