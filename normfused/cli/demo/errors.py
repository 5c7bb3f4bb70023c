"""The exception of the demo."""

from normfused.errors import CommandError


class DemoError(CommandError):
    """The demo cannot run. The message is one line for the user."""
