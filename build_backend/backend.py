"""PEP 517 backend: setuptools', plus the torch of the environment that is being installed into.

Under build isolation the packages of that environment are off the path. An extension must be compiled against the very
torch it will be loaded into, so that one is put back on the path; only where there is none does the build ask for one
of its own.
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
    """Return what the environment's own interpreter imports from.

    Asked of the interpreter, because a virtual environment may also see packages from outside of it. Isolation works
    through PYTHON* variables, which -E ignores.
    """
    command = [sys.executable, "-E", "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def expose_target() -> None:
    """Append that path to this interpreter's: last, so that the isolated build's own packages win."""
    sys.path += [entry for entry in target_path() if entry not in sys.path]


def _with_torch(requires: list[str]) -> list[str]:
    return requires if find_spec("torch") else [*requires, "torch"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Ask for torch where the target environment has none."""
    return _with_torch(_wheel_requires(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Ask for torch where the target environment has none."""
    return _with_torch(_editable_requires(config_settings))


sys.path.insert(0, str(Path(__file__).parent))  # where setup.py finds its helpers
expose_target()
