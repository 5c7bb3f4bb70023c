"""The compiled extension: sources, flags, and the record of the build."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from glob import glob
from pathlib import Path

import torch
from cuda_choice import Decision, Facts, choose_architectures, decide
from cuda_toolkit import Search, Toolkit, find_toolkit
from cxx_flags import Flags, family_of, flags_of
from jobs import default_jobs
from setuptools import Extension
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
NAME = "normfused._C"
CXX_SOURCES = ["csrc/*.cpp", "csrc/memory/*.cpp", "csrc/ops/*.cpp", "csrc/kernels/*/*.cpp"]
CUDA_SOURCES = ["csrc/ops/cuda/*.cpp", "csrc/kernels/cuda/*.cu"]
# --expt-relaxed-constexpr: kernels call constexpr member functions of structs that the host uses too. Half precision is
# converted by explicit functions, so torch's flags that disable its operators and conversions do no harm.
NVCC_FLAGS = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-std=c++17"]
# No source reads it. Builds reuse objects and do not track system headers, which torch's headers are here. With the
# version on the command line, another torch in the same place changes the command, and everything is recompiled.
TORCH_MACRO = ("NORMFUSED_TORCH_VERSION", torch.__version__)


def sources(*patterns: str) -> list[str]:
    """Return the matching files relative to the project's root, sorted for reproducible builds."""
    return sorted(path for pattern in patterns for path in glob(pattern, root_dir=ROOT, recursive=True))


@cache
def cuda() -> tuple[Decision, Facts, Toolkit | None]:
    """Return whether this environment builds for CUDA, the facts of the decision, and the toolkit if it does."""
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
    """Whether torch's build step supports the architecture: it raises for those that are not in its own list.

    True without torch's private function, so that the build step decides.
    """
    flags = getattr(cpp_extension, "_get_cuda_arch_flags", None)
    if flags is None:
        return True
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = architecture
    try:
        return bool(flags())
    except ValueError:
        return False
    finally:
        del os.environ["TORCH_CUDA_ARCH_LIST"]
        if before is not None:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


def cxx_command() -> list[str]:
    """Return the command of the C++ compiler, that of CXX or else torch's choice, with its arguments."""
    command = shlex.split(cpp_extension.get_cxx_compiler(), posix=os.name == "posix")
    if not command:
        raise RuntimeError("normfused: CXX is empty: set it to a C++ compiler, or unset it, then reinstall normfused")
    return command


def check_compiler(command: str) -> None:
    """Raise RuntimeError if the C++ compiler is not there. torch and ninja would report other things first."""
    if shutil.which(command) is None:
        raise RuntimeError(
            f"normfused: the C++ compiler {command!r} was not found: install one (on Debian and Ubuntu "
            "`apt-get install g++`), or set CXX to its path, then reinstall normfused"
        )


@cache
def cxx() -> tuple[str, Flags]:
    """Return what the C++ compiler says about itself, and its flags."""
    command = cxx_command()
    version = _version_of(command)
    has_omp_header = any((Path(path) / "omp.h").exists() for path in cpp_extension.include_paths())
    return version.split("\n")[0], flags_of(sys.platform, family_of(command[-1], version), has_omp_header)


def _version_of(command: list[str]) -> str:
    """Return the output of ``--version``; empty if the compiler is not found, which the build reports."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def torch_requirement() -> str:
    """Return the requirement on torch's series: another series may have another binary interface."""
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*"


def version_label() -> str:
    """Return the local version of a release, such as ``+torch2.13.cpu`` or ``+torch2.14.cu130``; otherwise nothing.

    The label gives wheels with different requirements different file names. Only releases have one: pip refuses a build
    whose version differs from that in the file name of the source distribution.
    """
    requested = os.environ.get("NORMFUSED_RELEASE") or "0"
    if requested not in ("0", "1"):
        raise RuntimeError(f"NORMFUSED_RELEASE must be 0 or 1, got {requested!r}")
    if requested == "0":
        return ""
    major, minor = torch.__version__.split(".")[:2]
    variant = f"cu{torch.version.cuda.replace('.', '')}" if cuda()[0].build else "cpu"
    return f"+torch{major}.{minor}.{variant}"


def extension() -> Extension:
    """Describe ``normfused._C``."""
    _, _, toolkit = cuda()
    _, flags = cxx()
    werror = [flags.werror] if os.environ.get("NORMFUSED_WERROR") == "1" else []
    system_include = [flags.system_include + path for path in cpp_extension.include_paths()]
    if toolkit:  # torch guesses it from the path of nvcc, which may be a script elsewhere
        cpp_extension.CUDA_HOME = str(toolkit.home)
    make = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    described = make(
        NAME,
        sources(*CXX_SOURCES, *(CUDA_SOURCES if toolkit else [])),
        include_dirs=[str(ROOT / "csrc"), *_cuda_include(toolkit)],
        define_macros=[TORCH_MACRO, *([("NORMFUSED_WITH_CUDA", "1")] if toolkit else [])],
        extra_compile_args={
            "cxx": [*flags.compile, *werror, *system_include],
            "nvcc": NVCC_FLAGS,
        },
        depends=sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh"),
    )
    if toolkit:  # by path: NVIDIA's wheels lack the file libcudart.so that -lcudart needs
        described.libraries = [name for name in described.libraries if name != "cudart"]
        described.extra_objects.append(str(toolkit.cudart))
    return described


def _cuda_include(toolkit: Toolkit | None) -> list[str]:
    """Return the folder of the toolkit's headers unless torch or the compiler searches it anyway."""
    known = toolkit and toolkit.include in (toolkit.home / "include", Path("/usr/include"))
    return [] if toolkit is None or known else [str(toolkit.include)]


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build step, which also prints its decision and writes a record next to the extension."""

    def run(self) -> None:
        """Build, and write ``_build_info.json``."""
        check_compiler(cxx_command()[0])
        decision, facts, toolkit = cuda()
        print(f"normfused: building for {'CUDA' if decision.build else 'CPU only'}: {decision.reason}", flush=True)
        if decision.warning:
            print(f"normfused: warning: {decision.warning}", flush=True)
        architectures = ";".join(facts.architectures.chosen) if decision.build else ""
        compiler, flags = cxx()
        if flags.warning:
            print(f"normfused: warning: {flags.warning}", flush=True)
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
            "compiler": compiler,
            "flags": " ".join(flags.compile),
            "cuda": decision.build,
            "cuda_reason": decision.reason,
            "cuda_how": decision.how,
            "cuda_archs": architectures,
        }
        path = Path(self.get_ext_fullpath(NAME)).with_name("_build_info.json")
        path.write_text(json.dumps(record, indent=2) + "\n")
