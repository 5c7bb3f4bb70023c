"""Batch norm of exact data: every result has the exact value, with tolerance 0. See ``exact_data.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from common import DTYPES, dtype_id, lay_out, sample_id
from exact_batch_norm import ACTIVATIONS, Call, make
from exact_data import assert_exact, on_cuda
from torch import Tensor

import normfused

pytestmark = pytest.mark.usefixtures("needs_extension")

# Shapes (N, C, L). Each comment names what changes there in csrc/kernels/cpu: plan.cpp, lanes.inl or reduce.inl.
SHAPES = [
    (4, 3, 1),
    (5, 2, 3),
    (7, 3, 25),  # fewer rows than rows of lanes need
    (8, 3, 25),  # the longest row that is reduced in lanes
    (9, 5, 26),
    (8, 70, 49),  # more channels than one unit
    (3, 33, 31),  # short rows of full vectors and a tail, for each instruction set
    (3, 33, 65),
    (3, 2, 129),  # long rows with a tail
    (1, 2, 8191),  # several folds
    (1, 128, 255),  # channels last: one split
    (1, 128, 256),  # two
    (257, 150, 2),  # channels last: several rows of lanes of one channel each
    (1, 3, 32767),  # channels first: one split
    (1, 3, 32769),  # two, of different size
    (7, 2, 9363),  # three; rows are divided
]


def channels_last(tensor: Tensor) -> Tensor:
    return lay_out(tensor, "channels_last")


@pytest.mark.parametrize("shape", SHAPES, ids=sample_id)
def test_values_in_any_order(shape: tuple[int, int, int], device: torch.device) -> None:
    for call in (Call(), Call(activation="relu", residual=True)):
        data = make(shape, torch.float32, torch.float32, call, shuffled=True)
        for layout in (Tensor.contiguous, channels_last):
            data.laid_out(layout, device).check()


def paired_shapes(dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """On both sides of the size at which channels are divided into splits. All splits begin at even positions."""
    split = (128 << 10) // dtype.itemsize
    return [(9, 3, 5), (2, 5, 30), (16, 32, 8), (2, 2, 128), (1, 3, split - 2), (1, 3, split + 3), (1, 128, 259)]


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=dtype_id)
def test_every_dtype(dtype: torch.dtype, parameter_dtype: torch.dtype, index: int, device: torch.device) -> None:
    shape = paired_shapes(dtype)[index]
    if on_cuda(device) and index not in (2, 3):
        pytest.skip("exact on CUDA only for powers of two: see exact_data.py")
    if parameter_dtype == torch.float16 and shape[0] * shape[2] > 1000:
        pytest.skip("gradients of parameters exceed float16")
    for call in (Call(), Call(activation="leaky_relu", residual=True)):
        data = make(shape, dtype, parameter_dtype, call)
        for layout in (Tensor.contiguous, channels_last):
            data.laid_out(layout, device).check()


CALLS = [
    Call(training, activation, residual, inplace, correction)
    for training in (True, False)
    for activation in ACTIVATIONS
    for residual in (False, True)
    for inplace in (False, True)
    for correction in (0, 1)
    if (not inplace or (activation in (None, "leaky_relu") and not residual)) and (training or correction == 1)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_call(call: Call, dtype: torch.dtype, device: torch.device) -> None:
    shuffled = dtype == torch.float32
    make((8, 4, 16), dtype, torch.promote_types(dtype, torch.float32), call, shuffled).laid_out(
        channels_last if call.residual else Tensor.contiguous, device
    ).check()


def negated(tensor: Tensor) -> Tensor:
    """A view that negates its memory."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda tensor: lay_out(tensor, "permuted"),
    "sliced": lambda tensor: lay_out(tensor, "sliced"),
    "unaligned": lambda tensor: lay_out(tensor, "offset"),
    "unaligned channels last": lambda tensor: lay_out(tensor.movedim(1, -1), "offset").movedim(-1, 1),
    "negated": negated,
    "some channels of more": lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 1, 2), value=torch.nan)[:, 1:-2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(8, 6, 11), (4, 40, 130), (2, 3, 17_000)], ids=sample_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    shuffled = dtype == torch.float32
    if on_cuda(device) and not shuffled:
        pytest.skip("exact on CUDA only for powers of two: see exact_data.py")
    call = Call(activation="relu", residual=True)
    data = make(shape, dtype, torch.promote_types(dtype, torch.float32), call, shuffled)
    data.laid_out(LAYOUTS[layout], device).check()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int, thread_count: None) -> None:
    torch.set_num_threads(threads)
    for shape in ((2, 3, 20_001), (600, 60, 1), (5, 70, 300)):
        data = make(shape, torch.float32, torch.float32, Call(), shuffled=True)
        for layout in (Tensor.contiguous, channels_last):
            data.laid_out(layout, torch.device("cpu")).check()


def test_excluded_positions(device: torch.device) -> None:
    """The values at positions that a mask excludes do not matter; there, results are 0."""
    for dtype, shuffled in ((torch.float32, True), (torch.float64, False)):
        for call in (Call(), Call(activation="relu", residual=True), Call(training=False)):
            data = make((1, 5, 2048), dtype, dtype, call, shuffled)
            mask = (torch.randperm(7 * 500) < 2048).view(7, 500)

            def spread(values: Tensor, excluded: float, mask: Tensor = mask) -> Tensor:
                target = values.new_full((*mask.shape, values.size(1)), excluded)
                target[mask] = values[0].T
                return target.movedim(-1, 1)

            data = replace(
                data,
                input=spread(data.input, torch.nan),
                grad_output=spread(data.grad_output, 3),
                residual=None if data.residual is None else spread(data.residual, torch.nan),
                mask=mask.to(device),
                expected={k: spread(v, 0) if v.dim() == 3 else v for k, v in data.expected.items()},
            )
            data.laid_out(Tensor.contiguous, device).check()


def test_sequences_of_different_lengths() -> None:
    lengths = torch.tensor([5, 300, 0, 207])
    data = make((1, 3, 512), torch.float32, torch.float32, Call(), True)
    layer = normfused.BatchNorm1d(3, eps=data.call.eps)
    with torch.no_grad():
        layer.weight.copy_(data.weight)
        layer.bias.copy_(data.bias)
    mask = torch.arange(300) < lengths[:, None]
    x = torch.full((4, 300, 3), torch.nan)
    x[mask] = data.input[0].T
    output = layer(x.movedim(-1, 1), lengths=lengths)
    assert_exact(output=(output.movedim(1, -1)[mask], data.expected["output"][0].T))


@pytest.mark.parametrize("count", [8, 65, 1025])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_as_torch(dtype: torch.dtype, count: int) -> None:
    """In evaluation torch computes the same numbers, which are exact there too."""
    data = make((count, 4, 1), dtype, dtype, Call(training=False))
    tensors = data.input, data.running_mean, data.running_var, data.weight, data.bias
    assert torch.equal(torch.nn.functional.batch_norm(*tensors, eps=data.call.eps), data.expected["output"])
