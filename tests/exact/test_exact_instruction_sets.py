"""The other tests of this folder with the instruction sets that are narrower than the best of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import normfused

SETS = ["baseline", "avx2", "avx512"]
# What does not depend on the kernels' vectors, or is slow.
LEFT_OUT = "not cuda and not ranks and not threads and not modulation and not stats and not as_torch"


@pytest.mark.exhaustive
@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("capability", SETS)
def test_narrower_instruction_sets(capability: str, tmp_path: Path) -> None:
    best = normfused.info()["cpu_capability"]
    if best not in SETS or SETS.index(capability) >= SETS.index(best):
        pytest.skip(f"the tests of this process run with {best}")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    environment = {**os.environ, "NORMFUSED_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [*command, f"--expect=extension {capability}", str(Path(__file__).parent)],
        cwd=tmp_path,  # not the checkout: its normfused/ may have no extension
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
