"""Finds a complete CUDA toolkit to build with, from the output of nvcc."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SYSTEM_HOME = Path("/usr/local/cuda")


class Toolkit(NamedTuple):
    """Paths of a toolkit, and the architectures that its nvcc can compile for."""

    home: Path  # contains bin/nvcc
    version: str  # such as "13.0"
    include: Path  # the folder of cuda_runtime.h
    cudart: Path  # the shared library
    architectures: frozenset[str]  # such as "9.0"


class Search(NamedTuple):
    """The toolkit, if any, and one line for each problem with an earlier candidate."""

    toolkit: Toolkit | None
    problems: list[str]


def find_toolkit(environ: Mapping[str, str], major: str, packages: Path) -> Search:
    """Search ``CUDA_HOME``, ``CUDA_PATH``, ``PATH``, ``/usr/local/cuda`` and the wheels in ``packages``, in this order.

    Returns the first complete toolkit of CUDA ``major``, otherwise the first complete one.
    """
    absent, problems, others = [], [], []
    for place, nvcc in _candidates(environ, major, packages):
        if nvcc is None:
            absent.append(place)
            continue
        found = examine(nvcc, packages)
        if isinstance(found, str):
            problems.append(found)
        elif found.version.split(".")[0] == major:
            return Search(found, problems + [f"no nvcc in {p}" for p in absent if p.startswith("CUDA_")])
        else:
            others.append(found)
    if absent:
        problems.append(f"no nvcc in {', '.join(absent)}")
    return Search(others[0] if others else None, problems)


def _candidates(environ: Mapping[str, str], major: str, packages: Path) -> Iterator[tuple[str, Path | None]]:
    """The names of the places to search, each with its nvcc."""
    places = [
        (f"{name}={environ[name]}", str(Path(environ[name]) / "bin"))
        for name in ("CUDA_HOME", "CUDA_PATH")
        if environ.get(name)
    ]
    places.append(("PATH", environ.get("PATH", os.defpath)))
    places += [(str(home), str(home / "bin")) for home in (SYSTEM_HOME, *_wheels(packages, major))]
    for place, path in places:
        nvcc = shutil.which("nvcc", path=path)
        yield place, Path(nvcc) if nvcc else None


def _wheels(packages: Path, major: str) -> list[Path]:
    """The folders of NVIDIA's wheels: one for all wheels since CUDA 13, one for each before."""
    names = [f"cu{major}"] if int(major) >= 13 else ["cuda_nvcc", "cuda_runtime"]
    return [packages / "nvidia" / name for name in names]


def examine(nvcc: Path, packages: Path) -> Toolkit | str:
    """Return the toolkit of this nvcc, or in one line what is missing. nvcc may be a script that calls another."""
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if version is None:
        return f"{nvcc} --version names no release"
    major = version[1].split(".")[0]
    said = dict(re.findall(r"^#\$ (\w+)=(.*)$", _output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.M))
    home = Path(said["TOP"].strip() if "TOP" in said else nvcc.resolve().parents[1]).resolve()
    release = f"nvcc {version[1]} of {home}"
    if not (home / "bin" / "nvcc").exists():
        return f"{release} is not in its folder bin"
    wheels = _wheels(packages, major)
    include, looked = _first(
        [*_folders(said, "INCLUDES", "-I"), home / "include", *(w / "include" for w in wheels), Path("/usr/include")],
        "cuda_runtime.h",
    )
    if include is None:
        return f"{release}, but no cuda_runtime.h in {looked}"
    libraries = [*_folders(said, "LIBRARIES", "-L"), home / "lib64", home / "lib", *(w / "lib" for w in wheels)]
    if sysconfig.get_config_var("MULTIARCH"):
        libraries.append(Path("/usr/lib") / sysconfig.get_config_var("MULTIARCH"))
    folder, looked = _first(libraries, f"libcudart.so.{major}*")
    if folder is None:
        return f"{release}, but no libcudart.so.{major} in {looked}"
    architectures = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch"))
    cudart = min(folder.glob(f"libcudart.so.{major}*"))
    return Toolkit(home, version[1], include, cudart, frozenset(f"{a}.{b}" for a, b in architectures))


def _output(*command: str | Path) -> str:
    """Return the output of a command, whatever its exit status; empty if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _folders(said: Mapping[str, str], variable: str, flag: str) -> list[Path]:
    """The folders that nvcc passes to the compiler with this flag, without the folders of stub libraries."""
    folders = [
        Path(word[len(flag) :]).resolve() for word in shlex.split(said.get(variable, "")) if word.startswith(flag)
    ]
    return [folder for folder in folders if folder.name != "stubs"]


def _first(folders: Sequence[Path], pattern: str) -> tuple[Path | None, str]:
    """Return the first folder with a matching file, and the names of all folders for an error message."""
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    found = next((folder for folder in folders if any(folder.glob(pattern))), None)
    return found, ", ".join(map(str, folders))
