"""Description of the machine, the device and the software of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    import normfused  # here because gpu_check.py uses this module before normfused is built

    info = normfused.info()
    description = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "cpu_capability": info["cpu_capability"],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "normfused": info["normfused"],
        "revision": revision(),
        "compiler": info.get("built_compiler"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        description |= {
            "gpu": properties.name,
            "gpu_capability": f"sm_{properties.major}{properties.minor}",
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return description


def slug(machine: dict[str, Any]) -> str:
    """The name of the results folder, such as ``cpu-intel-xeon-2.80ghz-avx512-2t``."""
    if machine["device"] == "cuda":
        return _slug("cuda", machine["gpu"])
    model = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@", " ", machine["cpu"], flags=re.IGNORECASE)
    return _slug("cpu", model, machine["cpu_capability"], f"{machine['threads']}t")


def _slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")


def _cpu_model() -> str:
    try:
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """The size of each cache of the first core. Empty without /sys."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    return caches


def fits(size: int) -> str | None:
    """The smallest cache that holds so many bytes: "L2" of one core, "L3", or "memory". None if no cache is known."""
    caches = _caches()
    for name, text in caches.items():
        level, kind = name.split()
        if kind != "instruction" and level != "L1" and size <= _bytes(text):
            return level
    return "memory" if caches else None


def _bytes(size: str) -> int:
    """The number of bytes of a size such as 2048K."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", size).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def revision() -> str | None:
    """``git describe`` of this checkout, or None without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
