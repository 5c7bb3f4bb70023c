"""The command ``normfused``. Nothing here is imported by ``import normfused``."""

INTERRUPTED = 130  # a shell's exit code for Ctrl-C
