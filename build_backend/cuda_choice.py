"""Whether the extension is built with CUDA, decided from facts alone."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# A100, H100 and H200, B200; PTX for what comes after. An nvcc from before 12.8 does not know the last.
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
EARLIER_ARCHS = "8.0;9.0+PTX"


class Decision(NamedTuple):
    """What is built, why, and what else the builder should hear."""

    build: bool
    reason: str
    how: str = ""
    warning: str = ""


class Facts(NamedTuple):
    """What the decision rests on."""

    torch: str
    torch_cuda: str | None
    nvcc: str | None
    has_sources: bool


def decide(facts: Facts, environ: Mapping[str, str]) -> Decision:
    """Build for CUDA when torch has CUDA, a matching nvcc is there and there are sources to compile.

    ``NORMFUSED_CUDA=0`` says no; ``NORMFUSED_CUDA=1`` turns every reason against into a RuntimeError.
    """
    wanted = environ.get("NORMFUSED_CUDA")
    if wanted not in (None, "", "0", "1"):
        raise RuntimeError(f"NORMFUSED_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return Decision(False, "NORMFUSED_CUDA=0", "reinstall without NORMFUSED_CUDA=0")
    decision = _judge(facts)
    if wanted == "1" and not decision.build:
        raise RuntimeError(f"NORMFUSED_CUDA=1, but {decision.reason}; {decision.how}")
    return decision


def _judge(facts: Facts) -> Decision:
    if not facts.has_sources:
        return Decision(False, "this version has no CUDA kernels", "install a version that has them")
    if facts.torch_cuda is None:
        how = "install a torch built for CUDA, then reinstall normfused"
        return Decision(False, f"torch {facts.torch} has no CUDA", how)
    if facts.nvcc is None:
        how = f"install the CUDA {facts.torch_cuda} toolkit or set CUDA_HOME, then reinstall normfused"
        return Decision(False, f"torch {facts.torch} has CUDA {facts.torch_cuda}, but there is no nvcc", how)
    both = f"nvcc {facts.nvcc} and torch's CUDA {facts.torch_cuda}"
    if facts.nvcc.split(".")[0] != facts.torch_cuda.split(".")[0]:
        return Decision(False, f"{both} differ in major version", f"install CUDA {facts.torch_cuda}'s nvcc")
    warning = "" if facts.nvcc == facts.torch_cuda else f"{both} differ in minor version"
    return Decision(True, f"torch {facts.torch}, nvcc {facts.nvcc}", warning=warning)


def arch_list(gpus: Iterable[tuple[int, int]], nvcc: str, environ: Mapping[str, str]) -> str:
    """Return the architectures to compile for: those asked for, else those of the GPUs in sight, else a default."""
    in_sight = ";".join(f"{major}.{minor}" for major, minor in sorted(set(gpus)))
    default = DEFAULT_ARCHS if tuple(map(int, nvcc.split("."))) >= (12, 8) else EARLIER_ARCHS
    return environ.get("TORCH_CUDA_ARCH_LIST") or in_sight or default


def nvcc_version(cuda_home: str | None) -> str | None:
    """Return the release of the nvcc below a CUDA home, such as ``"13.0"``."""
    if cuda_home is None or not (Path(cuda_home) / "bin" / "nvcc").exists():
        return None
    text = subprocess.run(
        [str(Path(cuda_home) / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None
