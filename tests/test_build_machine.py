"""What a build detects on its machine: the CUDA toolkit, and the number of compilers that may run at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "build_backend"))
import cuda_toolkit
import jobs
from cuda_toolkit import Search, find_toolkit


@pytest.fixture(autouse=True)
def system_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The substitute for /usr/local/cuda, initially empty."""
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_HOME", tmp_path / "system")
    return tmp_path / "system"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def toolkit(
    home: Path,
    release: str = "13.0",
    include: str | None = "include",
    lib: str | None = "lib64",
    says: str = "",
    prints_variables: bool = True,
) -> Path:
    """A folder like that of a toolkit. Its nvcc prints the same as NVIDIA's. Relative folders are below ``home``."""
    variables = f"#\\$ TOP={home}/bin/..\n{says}" if prints_variables else "nvcc fatal : no gcc"
    script(
        home / "bin" / "nvcc",
        f"""case "$*" in
*--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
*--list-gpu-arch*) printf "compute_75\\ncompute_90\\ncompute_100\\n" ;;
*--dryrun*) printf "%b" "{variables}" >&2 ;;
esac
""",
    )
    if include is not None:
        (home / include).mkdir(parents=True, exist_ok=True)
        (home / include / "cuda_runtime.h").touch()
    if lib is not None:
        (home / lib).mkdir(parents=True, exist_ok=True)
        (home / lib / f"libcudart.so.{release.split('.')[0]}").touch()
    return home


def find(tmp_path: Path, major: str = "13", path: str = "", **environ: str) -> Search:
    return find_toolkit({"PATH": path, **environ}, major, tmp_path / "site-packages")


def test_the_toolkit_of_cuda_home(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        found, problems = find(tmp_path, **{name: str(home)})
        assert problems == []
        assert found is not None
        assert found.home == home
        assert found.version == "13.0"
        assert found.include == home / "include"
        assert found.cudart == home / "lib64" / "libcudart.so.13"
        assert found.architectures == {"7.5", "9.0", "10.0"}


def test_a_script_elsewhere_that_calls_nvcc(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    script(tmp_path / "usr" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    found, problems = find(tmp_path, path=str(tmp_path / "usr" / "bin"))
    assert problems == []
    assert found is not None
    assert found.home == home


def test_a_link_elsewhere_to_an_nvcc_that_prints_no_variables(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", prints_variables=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    found, _ = find(tmp_path, path=str(tmp_path / "bin"))
    assert found is not None
    assert found.home == home


def test_headers_and_libraries_in_the_folders_that_nvcc_names(tmp_path: Path) -> None:
    """conda has them below targets/, distributions in separate folders."""
    elsewhere = tmp_path / "else where"
    says = (
        f'#\\$ INCLUDES=\\"-I{elsewhere}/inc\\"  \\n'
        f'#\\$ LIBRARIES=  \\"-L{elsewhere}/lib/stubs\\" \\"-L{elsewhere}/lib\\"\\n'
    )
    home = toolkit(tmp_path / "cuda", include=None, lib=None, says="\\n" + says)
    (elsewhere / "inc").mkdir(parents=True)
    (elsewhere / "inc" / "cuda_runtime.h").touch()
    for folder in ("lib", "lib/stubs"):
        (elsewhere / folder).mkdir()
        (elsewhere / folder / "libcudart.so.13").touch()
    found, problems = find(tmp_path, CUDA_HOME=str(home))
    assert problems == []
    assert found is not None
    assert found.include == elsewhere / "inc"
    assert found.cudart == elsewhere / "lib" / "libcudart.so.13"


@pytest.mark.parametrize("nvcc_too", [True, False])
def test_wheels(tmp_path: Path, nvcc_too: bool) -> None:
    """torch's wheels contain headers and the library; nvcc comes from another wheel, or from elsewhere."""
    wheels = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", lib="lib")
    home = wheels
    if not nvcc_too:
        (wheels / "bin" / "nvcc").unlink()
        home = toolkit(tmp_path / "cuda", include=None, lib=None)
    found, problems = find(tmp_path, path=str(home / "bin"))
    assert problems == []
    assert found is not None
    assert (found.home, found.include) == (home, wheels / "include")
    assert found.cudart == wheels / "lib" / "libcudart.so.13"


def test_wrong_cuda_home(tmp_path: Path, system_home: Path) -> None:
    toolkit(system_home)
    found, problems = find(tmp_path, CUDA_HOME="/nowhere")
    assert found is not None
    assert found.home == system_home
    assert problems == ["no nvcc in CUDA_HOME=/nowhere"]


def test_another_major_version_is_used_only_if_none_matches(tmp_path: Path, system_home: Path) -> None:
    old = toolkit(tmp_path / "old", "12.4")
    found, _ = find(tmp_path, path=str(old / "bin"))
    assert found is not None
    assert (found.home, found.version) == (old, "12.4")
    toolkit(system_home)
    found, _ = find(tmp_path, path=str(old / "bin"))
    assert found is not None
    assert (found.home, found.version) == (system_home, "13.0")


def test_no_toolkit_is_found(tmp_path: Path, system_home: Path) -> None:
    found, problems = find(tmp_path, path="/no/bin", CUDA_HOME="/nowhere")
    assert found is None
    wheels = tmp_path / "site-packages" / "nvidia" / "cu13"
    assert problems == [f"no nvcc in CUDA_HOME=/nowhere, PATH, {system_home}, {wheels}"]


@pytest.mark.parametrize("missing", ["cuda_runtime.h", "libcudart.so.13"])
def test_incomplete_toolkit(tmp_path: Path, missing: str) -> None:
    header = missing == "cuda_runtime.h"
    home = toolkit(tmp_path / "cuda", include=None if header else "include", lib=None if not header else "lib")
    found, problems = find(tmp_path, CUDA_HOME=str(home))
    assert found is None
    assert problems[0].startswith(
        f"nvcc 13.0 of {home}, but no {missing} in {home}/{'include' if header else 'lib64'}, "
    )
    assert f"{tmp_path}/site-packages/nvidia/cu13" in problems[0]


@pytest.mark.parametrize("text", ["exit 3\n", "echo what\n"])
def test_nvcc_that_does_not_work(tmp_path: Path, text: str) -> None:
    nvcc = script(tmp_path / "cuda" / "bin" / "nvcc", text)
    found, problems = find(tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert found is None
    assert problems[0] == f"{nvcc} --version names no release"


# ---- number of compilers ---------------------------------------------------------------------------------------------


def machine(root: Path, cgroup: str, **files: str) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 16),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "450000 100000\n"}, 4),
        ("0::/a/b\n", {"a/memory.max": str(11 * 2**30)}, 5),
        ("0::/a\n", {"memory.max": str(2**30)}, 1),
        ("0::/../../host\n", {"cpu.max": "50000 100000\n"}, 1),
        ("4:memory:/x\n2:cpu,cpuacct:/\n", {"memory/x/memory.limit_in_bytes": str(6 * 2**30)}, 3),
        (
            "4:memory:/x\n2:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)
def test_jobs_obey_the_limits_of_a_container(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_cores", lambda: 16)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**24}[name])
    assert jobs.default_jobs(machine(tmp_path, cgroup, **files)) == expected


def test_jobs_where_the_system_has_neither_cgroups_nor_sysconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert jobs.default_jobs(tmp_path) == 1
