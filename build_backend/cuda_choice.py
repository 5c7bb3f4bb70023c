"""Whether the extension is built with CUDA, and for what GPUs, decided from facts alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

# T4, A100, H100 and H200, B200, RTX 50; the last as PTX too, for what comes after.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")


class Decision(NamedTuple):
    """What is built, why, and what else the builder should hear."""

    build: bool
    reason: str
    how: str = ""
    warning: str = ""


class Architectures(NamedTuple):
    """What is compiled for, as in ``TORCH_CUDA_ARCH_LIST``; and what was requested but cannot be."""

    chosen: list[str]
    dropped: list[str]


class Facts(NamedTuple):
    """What the decision rests on."""

    torch: str
    torch_cuda: str | None
    nvcc: str | None
    has_sources: bool
    problems: tuple[str, ...] = ()  # of toolkits that were looked at
    architectures: Architectures = Architectures(["9.0"], [])


def decide(facts: Facts, environ: Mapping[str, str]) -> Decision:
    """Build for CUDA when torch has CUDA, a matching toolkit is there and there are sources to compile.

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
    """Those requested in the form of ``TORCH_CUDA_ARCH_LIST``, else those of the GPUs in sight, else a default.

    Of these, what both nvcc and torch know.
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
    """Whether nvcc knows a requested architecture. Names such as Hopper are known to torch alone, which has numbers."""
    number = re.match(r"\d+\.\d+", name)
    return number is None or number[0] in nvcc


def _for_gpus(gpus: Collection[tuple[int, int]], common: Sequence[tuple[int, ...]]) -> Architectures:
    """For each GPU the latest architecture that is not newer: as PTX too where only that runs on it.

    Machine code runs on GPUs of its own major version and the same or a later minor one.
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
