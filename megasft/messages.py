"""Output for the user: errors that the user can fix, and lines on standard error."""

import os
import sys


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file:line, key) and what would work.

    The command line prints the line and exits with code 2; nothing else in megasft does that.
    """


def say(message: str, details: str = "") -> None:
    """Print `details` of any length, then the line `megasft: message`, on standard error."""
    print(f"{details}megasft: {' '.join(message.split())}", file=sys.stderr, flush=True)


def say_once(line: str) -> None:
    """Print a line on standard error on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
