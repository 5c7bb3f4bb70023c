"""Loads the compiled extension, or records why the fallback is in use."""

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
    """Return the record that the build left next to the extension, or an empty one without a build."""
    try:
        info = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension, or None and the reason."""
    folder = Path(__file__).parent
    if not any(folder.glob("_C.*")):
        # Python started in a checkout imports it instead of the installed package.
        return None, f"{folder} has no compiled extension. In a checkout, start Python in another folder"
    built_for = str(_build_info.get("torch", "an unknown version"))
    versions = f"built for torch {built_for}, this is torch {torch.__version__}"
    if "torch" in _build_info and _series(built_for) != _series(torch.__version__):
        # Not imported: another series has another binary interface, and can crash instead of raising.
        return None, versions
    try:
        extension = importlib.import_module("normfused._C")
        importlib.import_module("normfused._ops")  # fake kernels and decompositions
    except Exception as error:  # whatever fails in a binary, the fallback works without it
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
    """Return why this build has no CUDA kernels, and how to get them, as an error message."""
    reason = _build_info.get("cuda_reason", "unknown reason")
    how = _build_info.get("cuda_how", "reinstall where torch has CUDA and nvcc is on the PATH")
    return f"normfused was built without CUDA ({reason}); to get it: {how}"


def info() -> dict[str, Any]:
    """Describe this installation.

    Returns:
        Versions; ``extension``, ``"loaded"`` or ``"fallback"``, and ``fallback_reason``; instruction set and number of
        threads of the CPU kernels; whether large outputs on the CPU use the memory pool; whether there are CUDA
        kernels; and the record of the build as ``built_...``.

    Example:
        >>> info()["extension"] in ("loaded", "fallback")
        True
    """
    return {
        "normfused": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": "loaded" if C is not None else "fallback",
        "fallback_reason": fallback_reason,
        "cpu_capability": C.cpu_capability() if C is not None else None,
        "threads": torch.get_num_threads() if C is None or C.uses_threads() else 1,
        "memory_pool": C is not None and bool(C.has_memory_pool()),
        "cuda": C is not None and bool(C.has_cuda()),
        **{f"built_{key}": value for key, value in _build_info.items()},
    }
