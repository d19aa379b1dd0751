"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file:line, key) and what would work.

    The command line prints the line and exits with code 2; nothing else in megasft does that.
    """
