"""The demo's one exception."""

from normfused.errors import CommandError


class DemoError(CommandError):
    """What keeps the demo from running, as one line for its user."""
