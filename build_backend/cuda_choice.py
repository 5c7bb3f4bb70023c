"""Decides whether the extension is built with CUDA, and for which GPUs. Pure functions of the facts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

# T4, A100, H100 and H200, B200, RTX 50; the last also as PTX, for later GPUs.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")


class Decision(NamedTuple):
    """Whether CUDA is built, the reason, how to change it, and a warning for the builder."""

    build: bool
    reason: str
    how: str = ""
    warning: str = ""


class Architectures(NamedTuple):
    """The architectures to compile for, in the form of ``TORCH_CUDA_ARCH_LIST``, and those that are not possible."""

    chosen: list[str]
    dropped: list[str]


class Facts(NamedTuple):
    """The input of the decision."""

    torch: str
    torch_cuda: str | None
    nvcc: str | None
    has_sources: bool
    problems: tuple[str, ...] = ()  # of the toolkits that were examined
    architectures: Architectures = Architectures(["9.0"], [])


def decide(facts: Facts, environ: Mapping[str, str]) -> Decision:
    """Build for CUDA if torch has CUDA, a matching toolkit is present, and there are sources to compile.

    ``NORMFUSED_CUDA=0`` disables CUDA. With ``NORMFUSED_CUDA=1`` every reason against it raises RuntimeError.
    """
    requested = environ.get("NORMFUSED_CUDA")
    if requested not in (None, "", "0", "1"):
        raise RuntimeError(f"NORMFUSED_CUDA must be 0 or 1, got {requested!r}")
    if requested == "0":
        return Decision(False, "NORMFUSED_CUDA=0", "reinstall without NORMFUSED_CUDA=0")
    decision = _judge(facts)
    if requested == "1" and not decision.build:
        raise RuntimeError(f"NORMFUSED_CUDA=1, but {decision.reason}; {decision.how}")
    return decision


def _judge(facts: Facts) -> Decision:
    if not facts.has_sources:
        return Decision(False, "this version has no CUDA kernels", "install a version that has them")
    if facts.torch_cuda is None:
        how = "install a torch built for CUDA, then reinstall normfused"
        return Decision(False, f"torch {facts.torch} has no CUDA", how)
    if int(facts.torch_cuda.split(".")[0]) < 12:
        how = "install a torch built for CUDA 12 or newer, then reinstall normfused"
        return Decision(False, f"torch {facts.torch} has CUDA {facts.torch_cuda}, and normfused needs 12 or newer", how)
    if facts.nvcc is None:
        how = f"install the CUDA {facts.torch_cuda} toolkit or set CUDA_HOME, then reinstall normfused"
        found = "; ".join(facts.problems)
        return Decision(
            False, f"torch {facts.torch} has CUDA {facts.torch_cuda}, but no toolkit is usable: {found}", how
        )
    both = f"nvcc {facts.nvcc} and torch's CUDA {facts.torch_cuda}"
    if facts.nvcc.split(".")[0] != facts.torch_cuda.split(".")[0]:
        return Decision(False, f"{both} differ in major version", f"install CUDA {facts.torch_cuda}'s nvcc")
    chosen, dropped = facts.architectures
    unknown = f"nvcc {facts.nvcc} or torch {facts.torch} cannot compile for {', '.join(dropped)}"
    if not chosen:
        return Decision(False, unknown, "set TORCH_CUDA_ARCH_LIST to what both know, then reinstall normfused")
    warnings = [*facts.problems, *([unknown] if dropped else [])]
    if facts.nvcc != facts.torch_cuda:
        warnings.append(f"{both} differ in minor version")
    return Decision(True, f"torch {facts.torch}, nvcc {facts.nvcc}", warning="; ".join(warnings))


def choose_architectures(
    requested: str | None,
    gpus: Collection[tuple[int, int]],
    nvcc: Collection[str],
    torch_knows: Callable[[str], bool],
) -> Architectures:
    """Return the requested architectures, otherwise those of the visible GPUs, otherwise the default ones.

    ``requested`` has the form of ``TORCH_CUDA_ARCH_LIST``. Architectures that nvcc or torch do not know are dropped.
    """
    if requested and requested != "native":
        names = requested.replace(";", " ").split()
        chosen = [name for name in names if torch_knows(name) and _known_by_number(name, nvcc)]
        return Architectures(chosen, [name for name in names if name not in chosen])
    common = sorted(tuple(map(int, name.split("."))) for name in nvcc if torch_knows(name))
    if gpus:
        return _for_gpus(gpus, common)
    chosen = [name for name in DEFAULT_ARCHITECTURES if tuple(map(int, name.split("."))) in common]
    if not chosen:
        return Architectures([], list(DEFAULT_ARCHITECTURES))
    return Architectures([*chosen[:-1], f"{chosen[-1]}+PTX"], [])


def _known_by_number(name: str, nvcc: Collection[str]) -> bool:
    """Whether nvcc knows a requested architecture. torch maps names such as Hopper to numbers; nvcc cannot be asked."""
    number = re.match(r"\d+\.\d+", name)
    return number is None or number[0] in nvcc


def _for_gpus(gpus: Collection[tuple[int, int]], common: Sequence[tuple[int, ...]]) -> Architectures:
    """Return for each GPU the latest architecture that is not newer than it, also as PTX if only PTX runs on it.

    Machine code runs on GPUs of the same major version and the same or a later minor version.
    """
    with_ptx: dict[tuple[int, ...], bool] = {}
    dropped = []
    for gpu in sorted(set(gpus)):
        latest = max((arch for arch in common if arch <= gpu), default=None)
        if latest is None:
            dropped.append(f"{gpu[0]}.{gpu[1]}")
        else:
            with_ptx[latest] = with_ptx.get(latest, False) or latest[0] != gpu[0]
    return Architectures(
        [f"{major}.{minor}{'+PTX' if ptx else ''}" for (major, minor), ptx in with_ptx.items()], dropped
    )
