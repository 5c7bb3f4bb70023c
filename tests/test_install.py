"""The build: which torch it uses, whether it compiles CUDA, contents and requirements of the distributions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from email import message_from_bytes, message_from_string
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[1]
BACKEND = ROOT / "build_backend"
SOURCES = [
    "csrc",
    "build_backend",
    "normfused",
    "release",
    "tests",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
]

sys.path.insert(0, str(BACKEND))
from cuda_choice import Architectures, Facts, choose_architectures, decide  # noqa: E402


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources without build products, because setuptools writes to where it builds."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def isolated(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that hides all packages but setuptools, as pip's build isolation does."""
    folder = tmp_path / "isolated"
    folder.mkdir()
    hide = "import sys\nsys.path = [p for p in sys.path if not p.endswith(('-packages', 'outside'))]\n"
    (folder / "sitecustomize.py").write_text(hide)
    site = Path(setuptools.__file__).parents[1]
    for part in [*site.glob("setuptools*"), site / "_distutils_hack"]:
        (folder / part.name).symlink_to(part)
    return folder


def call(script: str, cwd: Path, *path: Path, python: str | Path = sys.executable) -> str:
    """Run a script that may import the backend. Returns the last line that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, BACKEND]))}
    run = subprocess.run([python, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


CUDA = Facts(torch="2.13.0+cu130", torch_cuda="13.0", nvcc="13.0", has_sources=True)
CPU = Facts(torch="2.13.0+cpu", torch_cuda=None, nvcc="13.0", has_sources=True)
CUDA_11 = CUDA._replace(torch="2.6.0+cu118", torch_cuda="11.8", nvcc="11.8")
NO_NVCC = CUDA._replace(nvcc=None, problems=("no nvcc in CUDA_HOME=/cuda, PATH",))
OTHER_MAJOR = CUDA._replace(nvcc="12.8")
OTHER_MINOR = CUDA._replace(nvcc="13.2")
NO_SOURCES = CUDA._replace(has_sources=False)


@pytest.mark.parametrize(
    ("facts", "forced", "build", "reason"),
    [
        (CUDA, None, True, "torch 2.13.0+cu130, nvcc 13.0"),
        (CUDA, "", True, "torch 2.13.0+cu130, nvcc 13.0"),
        (CUDA, "1", True, "torch 2.13.0+cu130, nvcc 13.0"),
        (CUDA, "0", False, "NORMFUSED_CUDA=0"),
        (OTHER_MINOR, None, True, "torch 2.13.0+cu130, nvcc 13.2"),
        (CPU, None, False, "torch 2.13.0+cpu has no CUDA"),
        (CPU, "0", False, "NORMFUSED_CUDA=0"),
        (CUDA_11, None, False, "torch 2.6.0+cu118 has CUDA 11.8, and normfused needs 12 or newer"),
        (
            NO_NVCC,
            None,
            False,
            "torch 2.13.0+cu130 has CUDA 13.0, but no toolkit is usable: no nvcc in CUDA_HOME=/cuda, PATH",
        ),
        (OTHER_MAJOR, None, False, "nvcc 12.8 and torch's CUDA 13.0 differ in major version"),
        (OTHER_MAJOR, "0", False, "NORMFUSED_CUDA=0"),
        (NO_SOURCES, None, False, "this version has no CUDA kernels"),
    ],
)
def test_cuda_is_built_if_possible_and_requested(facts: Facts, forced: str | None, build: bool, reason: str) -> None:
    decision = decide(facts, {} if forced is None else {"NORMFUSED_CUDA": forced})
    assert (decision.build, decision.reason) == (build, reason)
    assert bool(decision.how) == (not build), "without CUDA, the decision must say how to get it"
    expected = "nvcc 13.2 and torch's CUDA 13.0 differ in minor version" if facts is OTHER_MINOR else ""
    assert decision.warning == expected


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            CPU,
            "NORMFUSED_CUDA=1, but torch 2.13.0+cpu has no CUDA; "
            "install a torch built for CUDA, then reinstall normfused",
        ),
        (
            NO_NVCC,
            "NORMFUSED_CUDA=1, but torch 2.13.0+cu130 has CUDA 13.0, but no toolkit is usable: "
            "no nvcc in CUDA_HOME=/cuda, PATH; "
            "install the CUDA 13.0 toolkit or set CUDA_HOME, then reinstall normfused",
        ),
        (
            OTHER_MAJOR,
            "NORMFUSED_CUDA=1, but nvcc 12.8 and torch's CUDA 13.0 differ in major version; install CUDA 13.0's nvcc",
        ),
        (
            NO_SOURCES,
            "NORMFUSED_CUDA=1, but this version has no CUDA kernels; install a version that has them",
        ),
    ],
)
def test_forcing_an_impossible_cuda_build_gives_a_one_line_error(facts: Facts, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        decide(facts, {"NORMFUSED_CUDA": "1"})
    assert str(error.value) == message


def test_cuda_is_forced_by_0_or_1() -> None:
    with pytest.raises(RuntimeError, match=r"^NORMFUSED_CUDA must be 0 or 1, got 'yes'$"):
        decide(CUDA, {"NORMFUSED_CUDA": "yes"})


NVCC_12_6 = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0"]
NVCC_13 = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"]


def torch_knows(architecture: str) -> bool:
    """Like a torch that does not know 12.1 and has a name for 9.0."""
    return architecture.removesuffix("+PTX") in ("7.0", *NVCC_13[:-1], "9.0a", "Hopper")


@pytest.mark.parametrize(
    ("nvcc", "gpus", "requested", "chosen", "dropped"),
    [
        (NVCC_13, [], None, "7.5;8.0;9.0;10.0;12.0+PTX", ""),
        (NVCC_12_6, [], "", "7.5;8.0;9.0+PTX", ""),
        (NVCC_13, [(9, 0), (8, 0), (9, 0)], None, "8.0;9.0", ""),
        (NVCC_13, [(9, 0)], "native", "9.0", ""),
        (NVCC_13, [(9, 0)], "8.0;10.0+PTX", "8.0;10.0+PTX", ""),
        (NVCC_13, [], "9.0a", "9.0a", ""),
        (NVCC_13, [], "8.0 Hopper", "8.0;Hopper", ""),
        (NVCC_13, [], "7.0;8.0;13.0+PTX", "8.0", "7.0;13.0+PTX"),
        (NVCC_13, [], "Pascal", "", "Pascal"),
        (NVCC_13, [(12, 1)], None, "12.0", ""),  # torch does not know 12.1, which runs code for 12.0
        (NVCC_12_6, [(12, 0)], None, "9.0+PTX", ""),
        (NVCC_12_6, [(9, 0), (10, 0)], None, "9.0+PTX", ""),
        (NVCC_13, [(13, 0)], None, "12.0+PTX", ""),
        (NVCC_13, [(7, 0), (8, 6)], None, "8.6", "7.0"),
        (NVCC_13, [(6, 1)], None, "", "6.1"),
        ([], [], None, "", "7.5;8.0;9.0;10.0;12.0"),
    ],
)
def test_architectures(
    nvcc: list[str], gpus: list[tuple[int, int]], requested: str | None, chosen: str, dropped: str
) -> None:
    found = choose_architectures(requested, gpus, nvcc, torch_knows)
    assert (";".join(found.chosen), ";".join(found.dropped)) == (chosen, dropped)


def test_unsupported_architectures_are_named() -> None:
    some = CUDA._replace(architectures=Architectures(["8.0"], ["7.0"]))
    assert decide(some, {}).warning == "nvcc 13.0 or torch 2.13.0+cu130 cannot compile for 7.0"
    none = CUDA._replace(architectures=Architectures([], ["6.1"]))
    assert decide(none, {})[:2] == (False, "nvcc 13.0 or torch 2.13.0+cu130 cannot compile for 6.1")


def test_without_torchs_list_of_architectures_its_build_step_decides() -> None:
    script = """
from torch.utils import cpp_extension
import extension
known = [extension._torch_knows("9.0"), extension._torch_knows("Pluto")]
del cpp_extension._get_cuda_arch_flags
print([*known, extension._torch_knows("Pluto")])
"""
    assert call(script, ROOT) == "[True, False, True]"


def test_rejected_toolkits_are_named() -> None:
    assert decide(CUDA._replace(problems=("no nvcc in CUDA_HOME=/cuda",)), {}).warning == "no nvcc in CUDA_HOME=/cuda"


@pytest.mark.parametrize("place", ["site-packages", "outside", "nowhere"])
def test_the_isolated_build_finds_the_torch_of_the_environment(place: str, tmp_path: Path, isolated: Path) -> None:
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    outside = tmp_path / "outside"
    (site / "outside.pth").write_text(f"{outside}\n")
    home = {"site-packages": site, "outside": outside, "nowhere": None}[place]
    (isolated / "ninja.py").touch()
    if home is not None:
        home.mkdir(exist_ok=True)
        (home / "torch.py").touch()
        (home / "ninja.py").touch()
    project = tmp_path / "project"
    project.mkdir()
    (project / "setup.py").write_text("from setuptools import setup\nsetup(name='anything')\n")
    script = """
import json
from importlib.util import find_spec
assert find_spec("torch") is None, "nothing is isolated"
import backend
found = [spec and spec.origin for spec in map(find_spec, ["torch", "ninja"])]
print(json.dumps([*found, backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()]))
"""
    found, ninja, *requires = json.loads(call(script, project, isolated, python=python))
    assert found == (home and str(home / "torch.py"))
    assert ninja == str(isolated / "ninja.py"), "the build's own packages come first"
    assert requires == ([["torch"]] * 2 if home is None else [[]] * 2)


def test_a_source_distribution_needs_no_torch_and_contains_all_build_inputs(
    checkout: Path, isolated: Path, tmp_path: Path
) -> None:
    (isolated / "torch").mkdir()
    (isolated / "torch" / "__init__.py").write_text("raise ImportError('a source distribution needs no torch')")
    (checkout / "normfused" / "_C.so").touch()
    (checkout / "normfused" / "_build_info.json").touch()
    script = "import backend; print(backend.build_sdist('..'))"
    archive = call(script, checkout, isolated)
    with tarfile.open(tmp_path / archive) as tar:
        top = archive.removesuffix(".tar.gz")
        members = {member.name.removeprefix(f"{top}/") for member in tar if member.isfile()}
        metadata = message_from_bytes(tar.extractfile(f"{top}/PKG-INFO").read())
    sources = {str(f.relative_to(checkout)) for f in checkout.rglob("*") if f.is_file() and ".egg-info" not in str(f)}
    build_products = {"normfused/_C.so", "normfused/_build_info.json"}
    assert sources - members == build_products
    assert {"csrc/binding.cpp", "build_backend/backend.py", "LICENSE", "setup.py"} <= members
    assert "torch>=2.6" in metadata.get_all("Requires-Dist")


def test_a_wheel_requires_the_torch_series_it_was_built_with(checkout: Path) -> None:
    folder = call("import backend; print(backend.prepare_metadata_for_build_wheel('.'))", checkout)
    metadata = message_from_string((checkout / folder / "METADATA").read_text())
    requires = metadata.get_all("Requires-Dist")
    major, minor, *_ = torch.__version__.split(".")
    assert f"torch=={major}.{minor}.*" in requires
    assert "numpy>=1.24" in requires
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.parametrize(("release", "label"), [("1", True), ("", False), ("yes", None)])
def test_a_release_states_torchs_series_in_its_version(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, release: str, label: bool | None
) -> None:
    monkeypatch.setenv("NORMFUSED_RELEASE", release)
    monkeypatch.setenv("NORMFUSED_CUDA", "0")
    script = "import backend; print(backend.prepare_metadata_for_build_wheel('.'))"
    if label is None:
        with pytest.raises(AssertionError, match=f"NORMFUSED_RELEASE must be 0 or 1, got '{release}'"):
            call(script, checkout)
        return
    metadata = message_from_string((checkout / call(script, checkout) / "METADATA").read_text())
    major, minor, *_ = torch.__version__.split(".")
    version = (ROOT / "normfused" / "_version.py").read_text().split('"')[1]
    assert metadata["Version"] == (f"{version}+torch{major}.{minor}.cpu" if label else version)


def test_an_old_setuptools_is_named(checkout: Path) -> None:
    script = "import setuptools, runpy; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    run = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines() == ["normfused: setuptools 77 or newer is needed, this is 65.5.0"]


def test_a_build_without_torch_fails_with_a_message(checkout: Path, isolated: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(isolated)}
    command = [sys.executable, "setup.py", "build_ext"]
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("normfused: no torch to build against: install torch, or")
