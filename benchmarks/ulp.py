"""Maximum errors of all operations in units in the last place, for each instruction set, and those of torch.

``python benchmarks/ulp.py`` writes results/ulp.json and docs/ulp.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
import torch
import ulp_activations
import ulp_operations
from torch import Tensor
from ulp_activations import FULL, SUMS, Figures, Function, Sample
from ulp_page import CAPABILITIES, render

import normfused
from normfused import activations

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/ulp.json", ROOT / "docs/ulp.md"


def cuda_formulas(build: Path) -> dict[str, Function]:
    """The formulas of the CUDA kernels on the host, for each direction in which CUDA's intrinsics can err."""
    sys.path.append(str(ROOT / "tests/host_cuda"))
    import host_build

    build.mkdir(parents=True, exist_ok=True)
    sources = [host_build.HERE / "activations.cpp"]
    library = ctypes.CDLL(str(host_build.build(build, host_build.gcc(), "-O2 -shared -fPIC", sources)))
    # In the order of DType in kernels/types.h.
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

    def function(approximation: int) -> Function:
        def run(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
            kind, z = list(activations.ACTIVATIONS).index(name), z.contiguous()
            results = torch.empty_like(z), torch.empty_like(z)
            pointers = (ctypes.c_void_p(t.data_ptr()) for t in (z, *results))
            parameter = ctypes.c_double(activations.ACTIVATION_PARAMS.get(name, 0.0))
            count = ctypes.c_int64(z.numel())
            assert library.evaluate_activation(dtypes.index(z.dtype), kind, parameter, approximation, *pointers, count)
            return results

        return run

    return {f"cuda {approximation:+}": function(approximation) for approximation in (-1, 0, 1)}


def own_figures(sample: Sample) -> Figures:
    """The errors of normfused with the instruction set of this process."""
    measured = ulp_activations.measure({"normfused": ulp_activations.normfused}, sample)
    return measured["normfused"] | ulp_operations.measure()["normfused"]


def figures_of(capability: str, sample: Sample) -> Figures | None:
    """The errors with an instruction set, in a process of its own. None if this machine does not have it."""
    command = [sys.executable, __file__, "--own", *map(str, sample)]
    environment = os.environ | {"NORMFUSED_CPU_CAPABILITY": capability}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(printed)
    return result["figures"] if result["capability"] == capability else None


def cuda_figures(sample: Sample, build: Path) -> Figures:
    """The errors of the CUDA formulas, in the worst direction of the intrinsics. They are compiled into `build`."""
    measured = ulp_activations.measure(cuda_formulas(build), sample)
    return {key: max(figures[key] for figures in measured.values()) for key in next(iter(measured.values()))}


def is_compared(key: str) -> bool:
    """Whether a figure hardly depends on rounding at single values, as the ulp of a sum that cancels does."""
    _, name, what, measure = key.split(", ")[:4]
    if name in ulp_activations.ACTIVATIONS:
        return measure == "terms" or not (what == "gradient" and name in SUMS)
    return key.endswith("terms")


def measure(sample: Sample) -> dict[str, Any]:
    found: dict[str, Figures] = {}
    for name in CAPABILITIES:
        figures = figures_of(name, sample)
        if figures is None:
            raise SystemExit(f"this machine does not support {name}, and the page needs all instruction sets")
        found[name] = figures
    found["cuda"] = cuda_figures(sample, ROOT / "build/ulp")
    found["torch"] = ulp_activations.measure({"torch": ulp_activations.torch_nn}, sample)["torch"]
    found["torch"] |= ulp_operations.measure()["torch"]
    rows = {key: {who: float(f"{f[key]:.4g}") for who, f in found.items() if key in f} for key in found["torch"]}
    return {"machine": machine.describe("cpu"), "sample": sample._asdict(), "figures": rows}


def save(measured: dict[str, Any]) -> None:
    """One line for each figure."""
    lines = ",\n".join(
        f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(row)}" for key, row in measured["figures"].items()
    )
    rest = json.dumps({key: value for key, value in measured.items() if key != "figures"}, indent=1)
    RESULT.write_text(f'{rest[:-2]},\n "figures": {{\n{lines}\n}}}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="measure nothing; write docs/ulp.md")
    parser.add_argument("--own", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if normfused.info()["extension"] != "loaded":
        raise SystemExit(f"normfused is measured with its extension: {normfused.info()['fallback_reason']}")
    torch.set_num_threads(1)
    if arguments.own:
        figures = own_figures(Sample(*arguments.own))
        print(json.dumps({"capability": normfused.info()["cpu_capability"], "figures": figures}))
        return 0
    if not arguments.render:
        save(measure(FULL))
    PAGE.write_text(render(json.loads(RESULT.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
