"""Loads the compiled extension, or says why it is not in use."""

from __future__ import annotations

import importlib
import json
import os
import platform
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normfused._version import __version__


def _read_build_info() -> dict[str, Any]:
    """Return what the build wrote down beside the extension; empty where there is no build."""
    try:
        info = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension, or why there is none."""
    built_for = str(_build_info.get("torch", "an unknown version"))
    versions = f"built for torch {built_for}, this is torch {torch.__version__}"
    if "torch" in _build_info and _series(built_for) != _series(torch.__version__):
        # Not even tried: another series' binary interface can crash instead of raising.
        return None, versions
    try:
        extension = importlib.import_module("normfused._C")
        importlib.import_module("normfused._ops")  # what compilers need to know of its operators
    except Exception as error:  # whatever is wrong with a binary, the package can do without it
        return None, f"{type(error).__name__}: {error} ({versions})"
    return extension, None


_build_info = _read_build_info()
C, fallback_reason = _load()

if fallback_reason is not None:
    message = f"normfused runs on its slower fallback in plain torch; its extension did not load: {fallback_reason}"
    if os.environ.get("NORMFUSED_STRICT") == "1":
        raise ImportError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def no_cuda_message() -> str:
    """Return why this build has no CUDA kernels, and how to get them."""
    reason = _build_info.get("cuda_reason", "unknown reason")
    how = _build_info.get("cuda_how", "reinstall where torch has CUDA and nvcc is on the PATH")
    return f"normfused was built without CUDA ({reason}); to get it: {how}"


def info() -> dict[str, Any]:
    """Describe this installation.

    Versions; whether the extension is ``"loaded"`` or a ``"fallback"`` stands in for it, and why; the instruction set
    and number of threads of its CPU kernels; whether it has CUDA kernels; and, under ``built_...``, how it was built.
    """
    return {
        "normfused": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": "loaded" if C is not None else "fallback",
        "fallback_reason": fallback_reason,
        "cpu_capability": C.cpu_capability() if C is not None else None,
        "threads": torch.get_num_threads(),
        "cuda": C is not None and bool(C.has_cuda()),
        **{f"built_{key}": value for key, value in _build_info.items()},
    }
