"""Builds normfused with CUDA from this checkout, without installing it: ``python benchmarks/gpu_build.py``.

The wheel is cached in build/gpu_check/ under a digest of the compiled sources, the torch version and the GPU; Python
files are always those of the checkout. ``--look`` builds nothing and prints what would be built.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/gpu_check"
COMPILED = ("csrc", "build_backend", "setup.py", "pyproject.toml")
sys.path.append(str(ROOT / "build_backend"))

from cuda_toolkit import Toolkit, find_toolkit  # noqa: E402

STRICT = {"NORMFUSED_CUDA": "1", "NORMFUSED_STRICT": "1"}


def digest(names: tuple[str, ...] = COMPILED, more: str = "") -> str:
    """A digest of files and folders of the checkout, by path and content, without generated files."""
    found = hashlib.sha256(more.encode())
    for path in (ROOT / name for name in names):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT)
            made = file.suffix in (".pyc", ".so") or file.name == "_build_info.json" or "results" in name.parts
            if file.is_file() and not made:
                found.update(f"{name}\0".encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:12]


def sources() -> str:
    """A digest of everything that can change a result: kernels, package, benchmarks and tests."""
    return digest((*COMPILED, "normfused", "benchmarks", "tests"))


def toolkit() -> Toolkit | None:
    """The CUDA toolkit that the build uses; None if there is none, or torch has no CUDA."""
    import torch

    if torch.version.cuda is None:
        return None
    packages = Path(torch.__file__).parents[1]
    return find_toolkit(os.environ, torch.version.cuda.split(".")[0], packages).toolkit


def environment(package: Path | None = None) -> Mapping[str, str]:
    """Environment variables of the stages: CUDA is required, CUDA_HOME is set, the built package is on PYTHONPATH."""
    found = toolkit()
    home = {"CUDA_HOME": str(found.home)} if found and not os.environ.get("CUDA_HOME") else {}
    paths = [str(package or site()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**STRICT, **home, "PYTHONPATH": os.pathsep.join(paths)}


def wheel() -> Path:
    """The path of the wheel for this Python, torch and GPU, whether it exists or not."""
    import torch

    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else ()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ".".join(map(str, gpu))
    made_for = f"{sys.version_info[:2]} {torch.__version__} {architectures}"
    return FOLDER / f"normfused-{digest(more=made_for)}.whl"


def site() -> Path:
    return wheel().with_suffix(".site")


def build() -> Path:
    """Builds the wheel unless it exists. Returns its path."""
    target = wheel()
    if target.exists():
        print(f"{target.name} is up to date")
        return target
    folder = FOLDER / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], env={**os.environ, **STRICT}, check=True)
    (made,) = folder.glob("*.whl")
    return made.rename(target)


def unpack(packed: Path) -> Path:
    """Unpacks a wheel and copies the Python files of this checkout over it. Returns the folder for PYTHONPATH."""
    folder = packed.with_suffix(".site")
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(unfinished)
        unfinished.rename(folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(ROOT / "normfused", folder / "normfused", ignore=ignored, dirs_exist_ok=True)
    return folder


def check(folder: str = "", *, cuda: bool = False) -> int:
    """Asserts that Python imports the package from this folder, with its extension."""
    import normfused

    info = normfused.info()
    print(*(f"{key}: {value}" for key, value in info.items()), sep="\n")
    assert (normfused.__file__ or "").startswith(folder), f"imported {normfused.__file__} instead of {folder}"
    assert info["extension"] == "loaded", info["fallback_reason"]
    assert info["cuda"] or not cuda, "normfused was built without CUDA"
    print("loaded", "with CUDA" if info["cuda"] else "without CUDA")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--look", action="store_true", help="build nothing; check the package that Python imports")
    parser.add_argument("--wheel-to", type=Path, metavar="DIR", help="also copy the wheel to this folder")
    parser.add_argument("--check", metavar="DIR", help="build nothing; check that the package in this folder has CUDA")
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.check, cuda=True)
    print(f"toolkit: {toolkit() or 'none, or a torch without CUDA'}")
    print(f"wheel: {wheel()}", flush=True)
    if arguments.look:
        return check()
    packed = build()
    folder = unpack(packed)
    if arguments.wheel_to:
        shutil.copy(packed, arguments.wheel_to)
    # In a new process, like the stages that follow.
    command = [sys.executable, __file__, "--check", str(folder)]
    return subprocess.run(command, env={**os.environ, **environment(folder)}, cwd=FOLDER).returncode


if __name__ == "__main__":
    raise SystemExit(main())
