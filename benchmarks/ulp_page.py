"""The page docs/ulp.md, from the figures of ulp.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ulp_activations
import ulp_operations
from tables import table
from ulp_activations import RANGES, SUMS, Sample

CAPABILITIES = ("baseline", "avx2", "avx512")
DTYPES = tuple(str(dtype)[6:] for dtype in ulp_activations.FLOATS)
NEAR, FAR = RANGES


def shown(figure: float) -> str:
    """Two significant digits, rounded up."""
    if figure == 0:
        return "0"
    step = 10.0 ** max(math.floor(math.log10(figure)) - 1, -2)
    rounded = math.ceil(figure / step - 1e-9) * step
    if rounded < 10:
        return f"{rounded:.1f}" if figure >= 1 else f"{rounded:.2f}"
    return f"{rounded:.0f}" if rounded < 1000 else f"{rounded:.1e}".replace("e+0", "e").replace("e+", "e")


def _cells(row: dict[str, float], names: tuple[str, ...]) -> list[str]:
    return [shown(row[name]) if name in row else "" for name in names]


def _activation_rows(figures: dict[str, dict[str, float]], dtype: str) -> Iterator[list[str]]:
    names = (*CAPABILITIES, "cuda", "torch")
    for name in ulp_activations.ACTIVATIONS:
        for label, what, measure in (
            ("", "output", "value"),
            (", gradient", "gradient", "value"),
            (", gradient, in ulp of its terms", "gradient", "terms"),
        ):
            if measure == "value" or name in SUMS:
                near, far = (figures[f"{dtype}, {name}, {what}, {measure}, {limit}"] for limit in (NEAR, FAR))
                yield [f"`{name}`{label}", *_cells(near, names), *_cells(far, names)]


def _operation_rows(figures: dict[str, dict[str, float]], dtype: str) -> Iterator[list[str]]:
    names = (*CAPABILITIES, "torch")
    for key, terms in figures.items():
        if key.startswith(f"{dtype}, ") and key.endswith(", terms"):
            result = figures[key.removesuffix("terms") + "value"]
            largest = {"normfused": max(result[name] for name in CAPABILITIES), "torch": result["torch"]}
            label = key.removeprefix(f"{dtype}, ").removesuffix(", terms")
            yield [label, *_cells(terms, names), *_cells(largest, ("normfused", "torch"))]


DEFINITION = """\
An error is |y − exact| / ulp(exact). The ulp of a number is the distance between the two neighboring numbers of the
format around it: 2^(e − p + 1) for 2^e ≤ |number| < 2^(e + 1), with p = 24 significant bits for float32, 53 for
float64, 11 for float16 and 8 for bfloat16. A result that is rounded once has an error of at most 0.5. The exact value
is computed from the same inputs, which are numbers of the format: in float64 for activations of the narrower formats,
with 100 bits for those of float64, and with 64 bits for norms. Figures have two digits and are rounded up.

A sum of terms of opposite signs can be much smaller than its terms. An error of one ulp of a term is then many ulp of
the sum, and the maximum over many values only shows how close to 0 one of the sums is. So errors of sums are also
given *in ulp of the terms*: the ulp of the sum of the absolute values of the terms. With g the gradient of the norm's
output before an activation, k = g · weight and d = (x − mean) · invstd:

| result | terms |
| --- | --- |
| output of a norm, also with an activation | d · weight, bias |
| grad_input | invstd · k, invstd · mean(k), invstd · d · mean(k · d) |
| grad_weight, grad_bias | g · d of each value, g of each value |
| mean | x / count of each value |
| gradient of `tanh` | 1, tanh² |
| gradient of `silu`, `gelu`, `gelu_tanh`, `hardswish`, each z · f(z) | f(z), z · f′(z) |
| output of `normalize` | x / std, mean / std |
| gradient of local response norm | its two terms, the second one with absolute values in its sum |"""

ACTIVATIONS = """\
Inputs: of float16 and bfloat16 all values; of float32 one value of {every} from 2^-12 to 2^7 and one of {thinner} of
the others, of both signs; of float64 {doubles} values, half of them uniform in [−8, 8), half with a uniform
exponent from 2^-60 to 2^20. Results below 2^-100 (float64: 2^-1000) are left out: there the exponential of float32
loses digits, or is 0. Each function is measured as the activation of a batch norm in evaluation that changes no
value.

*cuda*: the formulas of the CUDA kernels, compiled for the host, **not yet run on a GPU**. The C library's functions
replace those of CUDA's math library. CUDA's approximate intrinsics, which 16-bit data use, err by the maximum that
its programming guide states, in the worst direction."""

OPERATIONS = """\
Inputs are normally distributed with standard deviation 1 and mean 0.5; *large mean*: 1000, float16 100, bfloat16 10.
Shapes: {images}; *65536 values*: {large}; layer and RMS norm: {rows}. Group norm has 8 groups. eps is 1e-5. Weights
and biases are 0.5 to 1.5 with either sign, in the dtype of the input. Mean, variance and invstd of 16-bit inputs are
in ulp of float32, and torch computes them from the same values in float32. Local response norm: size 5, alpha 0.5;
torch computes it in float32 for 16-bit inputs. The last two columns are in ulp of the result; *normfused* is the
maximum of its three instruction sets."""


def render(measured: dict[str, Any]) -> str:
    figures, sample, description = measured["figures"], Sample(**measured["sample"]), measured["machine"]
    sizes = {"every": sample.every, "thinner": sample.every * ulp_activations.THINNER, "doubles": sample.doubles}
    shapes = {"images": ulp_operations.IMAGES, "large": ulp_operations.LARGE, "rows": ulp_operations.ROWS}
    parts = [
        "# Errors in units in the last place",
        "The maximum error of every operation on the CPU, for each instruction set, and that of torch for the same "
        "inputs.",
        f"Measured on {description['date'][:10]} ({description['cpu']}, which has all three instruction sets): "
        f"normfused {description['normfused']}, {description['compiler']}; torch {description['torch']}, "
        f"{description['torch_cpu_capability']}.  \n`python benchmarks/ulp.py` repeats it, and `tests/test_ulp.py` "
        "fails if a figure grows by more than 10 %.",
        "## Definition",
        DEFINITION,
        "## Activations",
        ACTIVATIONS.format(**sizes),
    ]
    header = ["\\|z\\| ≤ 5: baseline", "avx2", "avx512", "cuda", "torch"]
    header += [header[0].replace("5", "10^9"), *header[1:]]
    for dtype in DTYPES:
        parts += [f"### Activations, {dtype}", table(("", *header), _activation_rows(figures, dtype))]
    parts += ["## Norms, statistics and images", OPERATIONS.format(**shapes)]
    header = ["ulp of the terms: baseline", "avx2", "avx512", "torch", "ulp of the result: normfused", "torch"]
    for dtype in DTYPES:
        parts += [f"### Norms, {dtype}", table(("", *header), _operation_rows(figures, dtype))]
    return "\n\n".join(parts) + "\n"
