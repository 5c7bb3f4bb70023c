"""The demo's one exception."""


class DemoError(Exception):
    """What keeps the demo from running, as one line for its user."""
