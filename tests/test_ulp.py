"""No error of docs/ulp.md has grown, for each instruction set that this machine has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import dtype_id

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import ulp
import ulp_activations
import ulp_exact
import ulp_page

FIGURES: dict[str, dict[str, float]] = json.loads(ulp.RESULT.read_text())["figures"]


def grown(figures: ulp_activations.Figures, name: str) -> list[str]:
    """The figures that exceed the committed ones by more than 10 %, which the table's two digits can hide."""
    assert figures.keys() <= FIGURES.keys()
    compared = {key: figure for key, figure in figures.items() if ulp.is_compared(key)}
    assert len(compared) > 100
    pairs = ((key, figure, FIGURES[key][name]) for key, figure in compared.items())
    return [f"{key}: {figure:.4g}, committed {limit:.4g}" for key, figure, limit in pairs if figure > 1.1 * limit]


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("capability", ulp_page.CAPABILITIES)
def test_no_error_has_grown(capability: str) -> None:
    figures = ulp.figures_of(capability, ulp_activations.SMALL)
    if figures is None:
        pytest.skip(f"this machine does not support {capability}")
    errors = grown(figures, capability)
    assert not errors, "\n".join(errors)


def test_no_error_of_the_cuda_formulas_has_grown(cache: Path) -> None:
    errors = grown(ulp.cuda_figures(ulp_activations.SMALL, cache), "cuda")
    assert not errors, "\n".join(errors)


def test_the_page_shows_the_committed_figures() -> None:
    measured: dict[str, Any] = json.loads(ulp.RESULT.read_text())
    assert ulp.PAGE.read_text() == ulp_page.render(measured), "run: python benchmarks/ulp.py --render"


@pytest.mark.parametrize("dtype", ulp_activations.FLOATS, ids=dtype_id)
def test_an_ulp_is_the_distance_of_neighbors(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    below = [1.5, 1.0, limits.smallest_normal, limits.smallest_normal / 4, limits.max / 4, 3.140625]
    values = torch.tensor(below, dtype=torch.float64).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    steps = (values.view(bits) + 1).view(dtype).double() - values.double()
    assert ulp_exact.ulps(steps.numpy(), -values.double().numpy(), dtype).tolist() == [1.0] * len(below)
    # The least number, not the distance from 0 to 0.
    least = torch.tensor([1], dtype=bits).view(dtype).double().numpy()
    assert ulp_exact.ulps(least, np.zeros(1), dtype).tolist() == [1.0]


def test_figures_are_rounded_up_to_two_digits() -> None:
    assert [ulp_page.shown(figure) for figure in (0, 0.004, 0.5, 0.501, 1.01, 9.91, 12, 12.1, 12345)] == [
        *("0", "0.01", "0.50", "0.51", "1.1", "10", "12", "13", "1.3e4")
    ]
