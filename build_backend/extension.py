"""The compiled extension: what goes into it, with which flags, and what is written down about the build."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from glob import glob
from pathlib import Path

import torch
from cuda_choice import Decision, Facts, choose_architectures, decide
from cuda_toolkit import Search, Toolkit, find_toolkit
from jobs import default_jobs
from setuptools import Extension
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
NAME = "normfused._C"
# -fopenmp compiles at::parallel_for for the OpenMP that torch has loaded; it is not linked, because a second copy would
# give the process a second pool of threads.
# -fno-math-errno lets loops with a square root vectorize.
# GCC 12 takes the reference counts of torch's inlined headers for an overflow of a string.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-g0", "-fvisibility=hidden", "-fopenmp"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-stringop-overflow"]
CUDA_SOURCES = ["csrc/ops/cuda/*.cpp", "csrc/kernels/cuda/*.cu"]
# Kernels use members of structs that the host has too. Half precision goes through functions that say what they do.
NVCC_FLAGS = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-std=c++17"]
# Read by no source. Objects are reused between builds, and a change of system headers, which torch's are here, goes
# unseen: with its version on the command line, another torch in the same place has everything compiled anew.
TORCH_MACRO = ("NORMFUSED_TORCH_VERSION", torch.__version__)


def sources(*patterns: str) -> list[str]:
    """Return the files below the project's root that match, sorted, so that builds are alike."""
    return sorted(path for pattern in patterns for path in glob(pattern, root_dir=ROOT, recursive=True))


@cache
def cuda() -> tuple[Decision, Facts, Toolkit | None]:
    """Whether this environment builds for CUDA, what that rests on, and the toolkit if it does."""
    version = torch.version.cuda
    packages = Path(torch.__file__).parents[1]
    search = find_toolkit(os.environ, version.split(".")[0], packages) if version else Search(None, [])
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    facts = Facts(
        torch=torch.__version__,
        torch_cuda=version,
        nvcc=search.toolkit.version if search.toolkit else None,
        has_sources=bool(sources("csrc/**/*.cu")),
        problems=tuple(search.problems),
        architectures=choose_architectures(
            os.environ.get("TORCH_CUDA_ARCH_LIST"),
            gpus,
            search.toolkit.architectures if search.toolkit else (),
            _torch_knows,
        ),
    )
    decision = decide(facts, os.environ)
    return decision, facts, search.toolkit if decision.build else None


def _torch_knows(architecture: str) -> bool:
    """Whether torch's build step compiles for it: it has a list of its own, and raises for what is not in it."""
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = architecture
    try:
        return bool(cpp_extension._get_cuda_arch_flags())
    except ValueError:
        return False
    finally:
        del os.environ["TORCH_CUDA_ARCH_LIST"]
        if before is not None:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


def torch_requirement() -> str:
    """The torch series of this build: another series' binary interface may differ."""
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*"


def extension() -> Extension:
    """Describe ``normfused._C``."""
    _, _, toolkit = cuda()
    werror = ["-Werror"] if os.environ.get("NORMFUSED_WERROR") == "1" else []
    if toolkit:  # torch guesses it from where nvcc is, which may be a script elsewhere
        cpp_extension.CUDA_HOME = str(toolkit.home)
    make = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    described = make(
        NAME,
        sources("csrc/*.cpp", "csrc/ops/*.cpp", "csrc/kernels/*/*.cpp", *(CUDA_SOURCES if toolkit else [])),
        include_dirs=[str(ROOT / "csrc"), *_cuda_include(toolkit)],
        define_macros=[TORCH_MACRO, *([("NORMFUSED_WITH_CUDA", "1")] if toolkit else [])],
        extra_compile_args={
            # As system headers torch's own do not trip our warnings.
            "cxx": [*CXX_FLAGS, *werror, *(f"-isystem{path}" for path in cpp_extension.include_paths())],
            "nvcc": NVCC_FLAGS,
        },
        depends=sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh"),
    )
    if toolkit:  # by its path: NVIDIA's wheels have no libcudart.so, which -lcudart looks for
        described.libraries = [name for name in described.libraries if name != "cudart"]
        described.extra_objects.append(str(toolkit.cudart))
    return described


def _cuda_include(toolkit: Toolkit | None) -> list[str]:
    """Where the toolkit's headers are, if neither torch nor the compiler looks there."""
    known = toolkit and toolkit.include in (toolkit.home / "include", Path("/usr/include"))
    return [] if toolkit is None or known else [str(toolkit.include)]


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build step, which also says what it decided and leaves a record beside the extension."""

    def run(self) -> None:
        """Build, and write ``_build_info.json``."""
        decision, facts, toolkit = cuda()
        print(f"normfused: building for {'CUDA' if decision.build else 'CPU only'}: {decision.reason}", flush=True)
        if decision.warning:
            print(f"normfused: warning: {decision.warning}", flush=True)
        architectures = ";".join(facts.architectures.chosen) if decision.build else ""
        if toolkit:
            print(f"normfused: {toolkit.home}, {toolkit.cudart}, for {architectures}", flush=True)
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        os.environ.setdefault("MAX_JOBS", str(default_jobs()))
        super().run()
        record = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": sys.version.split()[0],
            "compiler": self._compiler(),
            "flags": " ".join(CXX_FLAGS),
            "cuda": decision.build,
            "cuda_reason": decision.reason,
            "cuda_how": decision.how,
            "cuda_archs": architectures,
        }
        path = Path(self.get_ext_fullpath(NAME)).with_name("_build_info.json")
        path.write_text(json.dumps(record, indent=2) + "\n")

    def _compiler(self) -> str:
        command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
