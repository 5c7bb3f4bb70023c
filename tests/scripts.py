"""Scripts in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "NORMFUSED_STRICT": "1", "OMP_NUM_THREADS": "2", **variables}


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Not in the checkout: its normfused/ may have no compiled extension.
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=os.sep, env=environment(**variables), capture_output=True, text=True)


def value(script: str, **variables: str) -> object:
    """What the script prints, as JSON."""
    done = python(script, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
