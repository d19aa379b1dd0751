"""The commands of `megasft`: their arguments and help. The work is done elsewhere, imported when it is asked for."""
