"""PEP 517 backend: setuptools' backend, with the torch of the target environment on the path.

Build isolation hides the packages of the environment that is being installed into. The extension must be compiled
against the torch that will load it, so this backend adds that torch to the path again. Only if the environment has no
torch does the build require one.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools.build_meta import *
from setuptools.build_meta import get_requires_for_build_editable as _editable_requires
from setuptools.build_meta import get_requires_for_build_wheel as _wheel_requires


def target_path() -> list[str]:
    """Return ``sys.path`` of the target environment.

    The interpreter reports it, because a virtual environment may also see packages from outside of it. Isolation uses
    PYTHON* variables, which -E ignores.
    """
    command = [sys.executable, "-E", "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def expose_target() -> None:
    """Append that path to this interpreter's: last, so that packages of the isolated build take precedence."""
    sys.path += [entry for entry in target_path() if entry not in sys.path]


def _with_torch(requires: list[str]) -> list[str]:
    return requires if find_spec("torch") else [*requires, "torch"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Require torch if the target environment has none."""
    return _with_torch(_wheel_requires(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Require torch if the target environment has none."""
    return _with_torch(_editable_requires(config_settings))


sys.path.insert(0, str(Path(__file__).parent))  # setup.py imports the other modules of this folder
expose_target()
