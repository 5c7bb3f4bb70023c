"""The flags of the C++ compiler. Pure functions of the platform and of what the compiler says about itself."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import NamedTuple


class Flags(NamedTuple):
    """The flags, those that make warnings errors, the prefix of a folder of system headers, and a warning."""

    compile: list[str]
    werror: str
    system_include: str  # suppresses warnings in the headers of that folder
    warning: str = ""


# -fno-math-errno allows loops with a square root to vectorize.
OPTIMIZATION = ["-O3", "-fno-math-errno", "-g0", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra"]
ONE_THREAD = "the CPU kernels will run on one thread: "


def family_of(command: str, version: str) -> str:
    """Return ``gcc``, ``clang``, ``clang-cl``, ``cl`` or ``unknown``, from a compiler's path and its ``--version``."""
    name = PurePath(command.replace("\\", "/")).name.lower().removesuffix(".exe")
    if re.fullmatch(r"clang-cl(-\d+)?", name):
        return "clang-cl"
    if name == "cl":
        return "cl"
    if "clang" in version:
        return "clang"
    return "gcc" if "Free Software Foundation" in version else "unknown"


def flags_of(platform: str, family: str, has_omp_header: bool) -> Flags:
    """Return the flags for ``sys.platform`` and a family. Raises RuntimeError if it cannot compile the kernels.

    ``has_omp_header``: whether torch's headers include omp.h.
    """
    if platform == "win32":
        return _windows(family)
    if platform == "darwin":
        return _macos(has_omp_header)
    if family == "gcc":
        # -fopenmp compiles at::parallel_for for the OpenMP runtime that torch has loaded. It is not linked: a second
        # runtime would give the process a second thread pool.
        # -Wno-stringop-overflow: GCC 12 reports false positives in torch's inlined reference counting.
        return Flags([*OPTIMIZATION, "-fopenmp", *WARNINGS, "-Wno-stringop-overflow"], "-Werror", "-isystem")
    # With -fopenmp, Clang calls functions of LLVM's runtime, which torch's wheels do not contain.
    warning = f"{ONE_THREAD}torch's OpenMP runtime on Linux is GCC's; set CXX=g++"
    return Flags([*OPTIMIZATION, *WARNINGS], "-Werror", "-isystem", warning)


def _macos(has_omp_header: bool) -> Flags:
    # Apple's driver refuses -fopenmp, but its compiler implements it. torch's wheels contain LLVM's runtime and omp.h.
    if has_omp_header:
        return Flags([*OPTIMIZATION, "-Xclang", "-fopenmp", *WARNINGS], "-Werror", "-isystem")
    return Flags([*OPTIMIZATION, *WARNINGS], "-Werror", "-isystem", f"{ONE_THREAD}torch's headers have no omp.h")


def _windows(family: str) -> Flags:
    if family != "clang-cl":
        raise RuntimeError(
            "normfused: the kernels need the vector types of GCC and Clang, which Microsoft's cl lacks: "
            "install LLVM, set CXX=clang-cl, then reinstall normfused"
        )
    flags = ["/O2", "/clang:-O3", "/clang:-fno-math-errno", "/W4"]
    warning = f"{ONE_THREAD}OpenMP of clang-cl would load a second runtime"
    return Flags(flags, "/WX", "-imsvc", warning)
