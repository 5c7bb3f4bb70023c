"""oneDNN via ctypes: finds the library, compiles driver.cpp against it at first use, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("driver.cpp")
CACHE = Path(__file__).parents[2] / "build" / "onednn"
PACKAGES = "onednn-cpu-gomp onednn-devel-cpu-gomp"
EPS = 1e-5  # torch.nn.BatchNorm2d's default


class UnavailableError(Exception):
    """oneDNN, its headers or a compiler is missing, or oneDNN does not implement the operation."""


class Arrays(ctypes.Structure):
    """The addresses of a call's tensors. See driver.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("src", "scale", "shift", "mean", "variance", "dst", "workspace"),
            *("diff_dst", "diff_src", "diff_scale", "diff_shift"),
        )
    ]


class Norm:
    """oneDNN's batch norm, with or without a fused ReLU, for one shape, dtype and layout ("nChw16c", …)."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, layout: str, *, relu: bool = False, training: bool = True
    ) -> None:
        self._driver = load()
        bfloat16 = dtype == torch.bfloat16
        dims = (ctypes.c_int64 * 4)(*shape)
        self._norm = self._driver.norm_new(dims, bfloat16, layout.encode(), relu, EPS, training)
        self._check(self._norm)
        self.implementation: str = self._driver.norm_implementation(self._norm).decode()
        self.workspace_bytes: int = self._driver.norm_workspace_bytes(self._norm)

    def __del__(self) -> None:
        self._driver.norm_delete(self._norm)

    def forward(self, arrays: Arrays) -> None:
        self._check(self._driver.norm_forward(self._norm, arrays))

    def backward(self, arrays: Arrays) -> None:
        self._check(self._driver.norm_backward(self._norm, arrays))

    def reorder(self, source: Tensor, target: Tensor, *, to_plain: bool) -> Tensor:
        """Copies a contiguous NCHW tensor into this layout, or back with `to_plain`. Returns the target."""
        self._check(self._driver.norm_reorder(self._norm, source.data_ptr(), target.data_ptr(), to_plain))
        return target

    def _check(self, done: object) -> None:
        if not done:
            raise UnavailableError(f"oneDNN: {self._driver.norm_error().decode()}")


@functools.cache
def load() -> ctypes.CDLL:
    """The driver. Compiles it if it is not in the cache."""
    driver = ctypes.CDLL(str(compiled()))
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures = {
        "norm_error": (text, []),
        "norm_version": (text, []),
        "norm_new": (pointer, [pointer, ctypes.c_bool, text, ctypes.c_bool, ctypes.c_float, ctypes.c_bool]),
        "norm_delete": (None, [pointer]),
        "norm_implementation": (text, [pointer]),
        "norm_workspace_bytes": (ctypes.c_size_t, [pointer]),
        "norm_reorder": (ctypes.c_bool, [pointer, pointer, pointer, ctypes.c_bool]),
        "norm_forward": (ctypes.c_bool, [pointer, ctypes.POINTER(Arrays)]),
        "norm_backward": (ctypes.c_bool, [pointer, ctypes.POINTER(Arrays)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(driver, name)
        function.restype, function.argtypes = result, arguments
    if driver.norm_version() is None:
        raise UnavailableError(driver.norm_error().decode())
    return driver


def version() -> str:
    """The version of the headers, for example "3.2.0"."""
    text = _version_header(_prefix()).read_text()
    found = dict(re.findall(r"define DNNL_VERSION_(MAJOR|MINOR|PATCH) (\d+)", text))
    return ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH"))


def _prefix() -> Path:
    """The folder with include/ and lib/ of oneDNN: $DNNLROOT, or that of this Python's packages."""
    for folder in (os.environ.get("DNNLROOT"), sys.prefix):
        if folder and all((Path(folder) / f).exists() for f in ("include/oneapi/dnnl/dnnl.hpp", "lib/libdnnl.so.3")):
            return Path(folder)
    raise UnavailableError(f"oneDNN is not installed (pip install {PACKAGES}) and DNNLROOT is not set")


def _version_header(prefix: Path) -> Path:
    return prefix / "include/oneapi/dnnl/dnnl_version.h"


def compiled() -> Path:
    """The path of the compiled driver. Its name has a digest of what it was compiled from.

    Raises:
        UnavailableError: oneDNN cannot be called here. The message says why, in one line.
    """
    prefix = _prefix()
    sources = SOURCE.read_bytes() + _version_header(prefix).read_bytes() + str(prefix).encode()
    digest = hashlib.sha256(sources).hexdigest()[:16]
    path = CACHE / f"driver-{digest}.so"
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise UnavailableError("no C++ compiler for the driver of oneDNN")
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{prefix}/include"]
    link = [f"-L{prefix}/lib", "-l:libdnnl.so.3", f"-Wl,-rpath,{prefix}/lib"]
    done = subprocess.run(
        [compiler, *flags, str(SOURCE), "-o", str(unfinished), *link], capture_output=True, text=True, check=False
    )
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise UnavailableError(f"the driver of oneDNN does not compile: {line}")
    unfinished.replace(path)
    return path
