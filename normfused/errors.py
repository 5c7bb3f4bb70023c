"""The exception of the commands."""


class CommandError(Exception):
    """A command cannot run. The message is one line for the user."""
