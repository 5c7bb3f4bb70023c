"""``python -m normfused``: the same as the command ``normfused``."""

from normfused.cli.main import main

raise SystemExit(main())
