"""The command ``normfused``. Nothing here is imported by ``import normfused``."""
