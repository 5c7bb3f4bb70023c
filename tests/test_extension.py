"""The extension is loaded; otherwise the package works without it and reports the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import numpy.linalg
import pytest
import torch

import normfused
from normfused import _extension

PACKAGE = Path(normfused.__file__).parent
BINARY = f"_C{EXTENSION_SUFFIXES[0]}"

USE_IT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import normfused
import torch
x = torch.randn(4, 3, 5, dtype=torch.float64)
error = normfused.BatchNorm1d(3).double()(x) - torch.nn.BatchNorm1d(3).double()(x)
messages = [[w.category.__name__, str(w.message)] for w in caught if "normfused" in str(w.message)]
print(json.dumps([messages, normfused.info(), error.abs().max().item()]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's Python files, without the extension."""
    ignored = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.json")
    return Path(shutil.copytree(PACKAGE, tmp_path / "normfused", ignore=ignored))


def run(package: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "NORMFUSED_STRICT": "0", **variables}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True)


def text_file(package: Path) -> None:
    (package / BINARY).write_text("not a shared object\n")
    (package / "_build_info.json").write_text(json.dumps({"torch": torch.__version__}))


def foreign(package: Path) -> None:
    (other,) = Path(numpy.linalg.__file__).parent.glob("_umath_linalg*.so")
    shutil.copy(other, package / BINARY)
    (package / "_build_info.json").write_text("[]")  # a build writes a dictionary


def cut_short(package: Path) -> None:
    text_file(package)
    (package / "_build_info.json").write_text("{")


def other_series(package: Path) -> None:
    (package / BINARY).write_text("never opened\n")
    (package / "_build_info.json").write_text(json.dumps({"torch": "1.13.1+cu117"}))


THIS = f"this is torch {torch.__version__}"


@pytest.mark.parametrize(
    ("spoil", "begins", "built_for"),
    [
        (text_file, "ImportError: ", f"built for torch {torch.__version__}"),
        (cut_short, "ImportError: ", "built for torch an unknown version"),
        (foreign, "ImportError: dynamic module does not define", "built for torch an unknown version"),
        (other_series, "built for torch 1.13.1+cu117", "built for torch 1.13.1+cu117"),
    ],
)
def test_an_unusable_extension_gives_the_fallback_and_one_warning(
    package: Path, spoil, begins: str, built_for: str
) -> None:
    spoil(package)
    done = run(package, USE_IT)
    assert done.returncode == 0, done.stderr
    messages, info, error = json.loads(done.stdout)
    assert len(messages) == 1, messages
    category, message = messages[0]
    assert category == "RuntimeWarning"
    assert info["extension"] == "fallback"
    assert info["cpu_capability"] is None
    assert info["cuda"] is False
    why = info["fallback_reason"]
    assert why.startswith(begins)
    assert f"{built_for}, {THIS}" in why
    assert message == f"normfused runs on its slower fallback in plain torch; its extension did not load: {why}"
    assert error < 1e-12


def test_the_folder_without_an_extension_is_named(package: Path) -> None:
    """As in a checkout, whose sources Python finds before the installed package."""
    done = run(package, USE_IT)
    assert done.returncode == 0, done.stderr
    ((_, message),), info, _ = json.loads(done.stdout)
    reason = f"{package} has no compiled extension. In a checkout, start Python in another folder"
    assert info["fallback_reason"] == reason
    assert message.endswith(reason)


def test_strict_makes_the_fallback_an_import_error(package: Path) -> None:
    done = run(package, "import normfused", NORMFUSED_STRICT="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: normfused runs on its slower fallback in plain torch; "
    )


@pytest.mark.usefixtures("needs_extension")
def test_the_extension_matches_torch_and_loads_without_warning() -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", "import normfused"]
    subprocess.run(command, check=True, cwd=Path(sys.executable).parent)
    info = normfused.info()
    assert info["fallback_reason"] is None
    assert info["built_torch"] == torch.__version__
    assert info["built_version"].split("+")[0] == normfused.__version__  # a release also states torch's series
    assert info["cpu_capability"] in {"avx512", "avx2", "baseline"}


@pytest.mark.usefixtures("needs_extension")
def test_info_says_what_the_platform_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory pool exists on Linux only; without OpenMP of torch's kind the kernels have one thread."""
    show = [sys.executable, "-c", "import normfused; print(normfused.info()['memory_pool'])"]
    for setting, expected in (("1", sys.platform == "linux"), ("0", False)):
        environment = {**os.environ, "NORMFUSED_POOL": setting}
        done = subprocess.run(show, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n"
    assert normfused.info()["threads"] == torch.get_num_threads()
    serial = SimpleNamespace(uses_threads=lambda: False, has_memory_pool=bool, has_cuda=bool, cpu_capability=str)
    monkeypatch.setattr(_extension, "C", serial)
    assert normfused.info()["threads"] == 1


def test_import_leaves_ddp_unpatched_until_a_synchronized_layer_is_made(tmp_path: Path) -> None:
    code = """
import sys
from torch.nn.parallel import DistributedDataParallel as DDP
check = DDP._passing_sync_batchnorm_handle
import normfused
assert DDP._passing_sync_batchnorm_handle is check
assert not any(name.startswith("normfused.cli") for name in sys.modules)
normfused.SyncBatchNorm(3)
assert DDP._passing_sync_batchnorm_handle is not check
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)  # not the checkout, which may not be built
