"""PEP 517 backend: setuptools', plus the torch of the environment that is being installed into.

Under build isolation the packages of that environment are off the path, but sysconfig still names where they are. An
extension must be compiled against the very torch it will be loaded into, so that one is put back on the path; only
where there is none does the build ask for one of its own.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import PathDistribution, distributions
from pathlib import Path
from typing import Any

from setuptools.build_meta import *
from setuptools.build_meta import get_requires_for_build_editable as _editable_requires
from setuptools.build_meta import get_requires_for_build_wheel as _wheel_requires

# setup.py imports its helper from here.
sys.path.insert(0, str(Path(__file__).parent))


def torch_site() -> Path | None:
    """Return the site-packages of the target environment that hold torch, if any do."""
    for scheme in ("platlib", "purelib"):
        site = Path(sysconfig.get_path(scheme))
        if (site / "torch" / "version.py").is_file():
            return site
    return None


def _expose_torch() -> bool:
    site = torch_site()
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))  # last: the isolated environment's own packages win
    return site is not None or any(isinstance(d, PathDistribution) for d in distributions(name="torch"))


_has_torch = _expose_torch()


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Ask for torch where the target environment has none."""
    return [*_wheel_requires(config_settings), *([] if _has_torch else ["torch"])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Ask for torch where the target environment has none."""
    return [*_editable_requires(config_settings), *([] if _has_torch else ["torch"])]
