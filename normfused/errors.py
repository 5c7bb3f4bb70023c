"""The exception of the commands and of files."""


class CommandError(ValueError):
    """A command cannot run, or files cannot be read. The message is one line for the user."""
