"""The `megasft` command: `main` runs it; importing the modules of `commands` registers each command, in this order."""

# isort: off
from megasft.launch.parent import die_with_launcher

die_with_launcher()  # before the imports, which take seconds

from megasft.commands import train, plan, conversations, generate, evaluate, adapters, dashboard  # noqa: E402, F401

# isort: on
from megasft.commands.app import app, main  # noqa: E402

__all__ = ["app", "main"]
