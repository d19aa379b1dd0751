"""The `megasft` command: `main` runs it; importing the modules of `commands` registers each command, in this order."""

# isort: off
from megasft.commands import train, conversations, generate, adapters  # noqa: F401

# isort: on
from megasft.commands.app import app, main

__all__ = ["app", "main"]
