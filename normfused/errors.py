"""The one exception of the commands."""


class CommandError(Exception):
    """What keeps a command from running, as one line for its user."""
