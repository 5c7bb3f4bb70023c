"""``python -m normfused``: the same as the command ``normfused``."""

from normfused.cli import main

raise SystemExit(main())
