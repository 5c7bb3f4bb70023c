"""The compiled extension: what goes into it, with which flags, and what is written down about the build."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

import torch
from cuda_choice import Decision, Facts, arch_list, decide, nvcc_version
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


def cuda_decision() -> Decision:
    """Whether this environment builds for CUDA."""
    nvcc = nvcc_version(cpp_extension.CUDA_HOME)
    has_sources = bool(sources("csrc/**/*.cu"))
    return decide(Facts(torch.__version__, torch.version.cuda, nvcc, has_sources), os.environ)


def torch_requirement() -> str:
    """The torch series of this build: another series' binary interface may differ."""
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*"


def extension() -> Extension:
    """Describe ``normfused._C``."""
    cuda = cuda_decision().build
    werror = ["-Werror"] if os.environ.get("NORMFUSED_WERROR") == "1" else []
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return make(
        NAME,
        sources("csrc/*.cpp", "csrc/ops/*.cpp", "csrc/kernels/*/*.cpp", *(CUDA_SOURCES if cuda else [])),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[TORCH_MACRO, *([("NORMFUSED_WITH_CUDA", "1")] if cuda else [])],
        extra_compile_args={
            # As system headers torch's own do not trip our warnings.
            "cxx": [*CXX_FLAGS, *werror, *(f"-isystem{path}" for path in cpp_extension.include_paths())],
            "nvcc": NVCC_FLAGS,
        },
        depends=sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh"),
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build step, which also says what it decided and leaves a record beside the extension."""

    def run(self) -> None:
        """Build, and write ``_build_info.json``."""
        decision = cuda_decision()
        print(f"normfused: building for {'CUDA' if decision.build else 'CPU only'}: {decision.reason}", flush=True)
        if decision.warning:
            print(f"normfused: warning: {decision.warning}", flush=True)
        if decision.build:
            gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
            nvcc = nvcc_version(cpp_extension.CUDA_HOME)
            assert nvcc is not None  # the decision rests on it
            os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list(gpus, nvcc, os.environ)
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
            "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if decision.build else "",
        }
        path = Path(self.get_ext_fullpath(NAME)).with_name("_build_info.json")
        path.write_text(json.dumps(record, indent=2) + "\n")

    def _compiler(self) -> str:
        command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]


def default_jobs() -> int:
    """As many compilers at once as there are cores, or room for: one takes up to 2 GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // 2**31))
