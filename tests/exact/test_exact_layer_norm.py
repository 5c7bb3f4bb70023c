"""Layer norm and RMS norm of exact data: every result has the exact value, with tolerance 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import DTYPES, dtype_id, lay_out, sample_id
from exact_data import assert_exact, on_cuda, statistics
from exact_rows import rows_of
from torch import Tensor

from normfused import functional

pytestmark = pytest.mark.usefixtures("needs_extension")

NORMS: dict[tuple[bool, bool], Callable[..., Any]] = {  # by channel, RMS
    (False, False): functional.layer_norm,
    (False, True): functional.rms_norm,
    (True, False): functional.layer_norm2d,
    (True, True): functional.rms_norm2d,
}


def check(
    shape: tuple[int, int],
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    shuffled: bool,
    device: torch.device,
    rms: bool = False,
    samples: int | None = None,
    with_residual: bool = False,
    layout: str = "contiguous",
) -> None:
    """Statistics of `shape[1]` values at `shape[0]` positions: rows, or with `samples` channels of so many samples."""
    positions, count = shape
    index = np.broadcast_to(np.arange(count), shape)
    shuffled = shuffled and not rms  # the mean of RMS norm is not near 2^23
    data = statistics(positions, [count], shuffled)
    rows = rows_of(data, index, dtype, parameter_dtype, shuffled, rms=rms)

    def arranged(values: Tensor) -> Tensor:
        values = values if samples is None else values.view(samples, positions // samples, count).transpose(1, 2)
        return lay_out(values.to(device), layout)

    residual = arranged(rows.residual)
    x = arranged(rows.input - rows.residual) if with_residual else arranged(rows.input)
    leaves = [x.requires_grad_(), rows.weight.clone().to(device).requires_grad_()]
    options: dict[str, Any] = {"eps": rows.eps}
    if not rms:
        leaves.append(rows.bias.clone().to(device).requires_grad_())
        options["bias"] = leaves[2]
    if with_residual:
        leaves.append(residual.requires_grad_())
        options["residual"] = residual
    norm = NORMS[samples is not None, rms]
    outputs = norm(x, *([] if samples is not None else [(count,)]), weight=leaves[1], **options)
    expected = {name: arranged(value).cpu() if value.dim() == 2 else value for name, value in rows.expected.items()}
    gradients = [arranged(rows.grad_output)]
    got = {}
    if with_residual:  # the sum has a gradient of its own, here the residual's values
        outputs, total = outputs
        got["sum"], expected["sum"] = total, arranged(rows.input).cpu()
        expected["grad_input"] = expected["grad_residual"] = expected["grad_input"] + residual.detach().cpu()
        outputs, gradients = [outputs, total], [*gradients, residual.detach()]
    else:
        outputs = [outputs]
        del expected["grad_residual"]
    if rms:
        del expected["grad_bias"]
    got["output"] = outputs[0]
    names = [name for name in ("grad_input", "grad_weight", "grad_bias", "grad_residual") if name in expected]
    got |= zip(names, torch.autograd.grad(outputs, leaves, gradients), strict=True)
    assert got.keys() == expected.keys()
    assert_exact(**{name: (got[name], expected[name]) for name in got})


# Each comment names what changes there in csrc/kernels/cpu: plan.cpp or layer_norm.inl.
ROWS = [
    (5, 9),
    (70, 33),  # more rows than one task
    (3, 65),
    (129, 767),  # several chunks of backward
    (2, 16_384),  # backward, the longest row that is not divided
    (2, 16_385),
    (3, 32_769),  # forward: a row that is divided into parts
    (2, 70_001),
]
modes = pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])


@pytest.mark.parametrize("shape", ROWS, ids=sample_id)
@modes
def test_rows_in_any_order(rms: bool, shape: tuple[int, int], device: torch.device) -> None:
    if rms and on_cuda(device):
        pytest.skip("exact on CUDA only for powers of two: see exact_data.py")
    check(shape, torch.float32, torch.float32, True, device, rms, with_residual=shape[0] % 2 == 1)


@pytest.mark.parametrize("shape", [(6, 16), (40, 256), (4, 4096)], ids=sample_id)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=dtype_id)
@modes
def test_every_dtype(
    rms: bool, dtype: torch.dtype, parameter_dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    check(shape, dtype, parameter_dtype, False, device, rms)
    check(shape, dtype, parameter_dtype, False, device, rms, with_residual=True)


@pytest.mark.parametrize("shape", [(9, 31), (2, 9000), (2, 65_603)], ids=sample_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
@modes
def test_divided_rows(rms: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(shape, dtype, torch.promote_types(dtype, torch.float32), False, torch.device("cpu"), rms)


@pytest.mark.parametrize("shape", [(2 * 49, 24), (2 * 65, 97), (1100, 40), (3 * 33, 3000)], ids=sample_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@modes
def test_over_channels(rms: bool, layout: str, shape: tuple[int, int], device: torch.device) -> None:
    if rms and on_cuda(device):
        pytest.skip("exact on CUDA only for powers of two: see exact_data.py")
    samples = 3 if shape[0] % 3 == 0 else 2
    for residual in (False, True):
        check(shape, torch.float32, torch.float32, True, device, rms, samples, residual, layout)
    if not on_cuda(device):
        check(shape, torch.float64, torch.float64, False, device, rms, samples, True, layout)
        check(shape, torch.float16, torch.float32, False, device, rms, samples, True, layout)


@pytest.mark.parametrize("layout", ["sliced", "offset"])
@modes
def test_layouts(rms: bool, layout: str) -> None:
    check((7, 50), torch.float32, torch.float32, True, torch.device("cpu"), rms, layout=layout, with_residual=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@modes
def test_any_number_of_threads(rms: bool, threads: int, thread_count: None) -> None:
    torch.set_num_threads(threads)
    for shape in ((300, 100), (3, 40_001)):
        check(shape, torch.float32, torch.float32, True, torch.device("cpu"), rms)
