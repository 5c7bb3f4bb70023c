"""Batch norm, functional and as a module, compared with torch and with long double. Runs on the fallback too."""

from __future__ import annotations

import pytest
import torch
from common import DTYPES, LAYOUTS, assert_as_close_as_torch, assert_same_bits, dtype_id, lay_out, make_arguments, run
from torch import nn
from torch.nn import functional as F

import normfused
from normfused.functional import batch_norm

MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def module_for(x: torch.Tensor, **arguments) -> nn.Module:
    return getattr(normfused, MODULES[x.dim()])(x.size(1), device=x.device, **arguments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_every_layout_is_as_close_as_torch(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], layout: str, grad_layout: str, training: bool
) -> None:
    for affine in (True, False):
        arguments = make_arguments((4, 5, 3, 6), *dtypes, device, layout, grad_layout, affine)
        ours, theirs = (run(f, arguments, training) for f in (batch_norm, F.batch_norm))
        assert_as_close_as_torch(ours, theirs, arguments, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "shape",
    [(7, 3), (300, 17), (2, 64), (3, 5, 9), (2, 33, 1), (2, 3, 4, 5, 6), (5, 1, 7, 7), (2, 40, 31, 33)],
    ids=str,
)
def test_every_number_of_dimensions_is_as_close_as_torch(
    device: torch.device, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], training: bool
) -> None:
    for layout in ("contiguous", "channels_last"):
        arguments = make_arguments(shape, *dtypes, device, layout, layout)
        ours, theirs = (run(f, arguments, training) for f in (batch_norm, F.batch_norm))
        assert_as_close_as_torch(ours, theirs, arguments, training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 2), (3, 4, 2, 3, 2)], ids=str)
def test_module_equals_the_function(
    device: torch.device, shape: tuple[int, ...], training: bool, dtype: torch.dtype
) -> None:
    arguments = make_arguments(shape, dtype, dtype, device)
    module = module_for(arguments.input, dtype=dtype, momentum=0.3, eps=1e-3).train(training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(arguments, name))
    x = arguments.input.clone().requires_grad_()
    y = module(x)
    y.backward(arguments.grad_output)
    expected = run(batch_norm, arguments, training, momentum=0.3, eps=1e-3)
    assert_same_bits(y, expected.output)
    assert_same_bits(x.grad, expected.grad_input)
    assert_same_bits(module.weight.grad, expected.grad_weight)
    assert_same_bits(module.bias.grad, expected.grad_bias)
    assert_same_bits(module.running_mean, expected.running_mean)
    assert_same_bits(module.running_var, expected.running_var)
    assert module.num_batches_tracked == int(training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_autocast_keeps_dtypes_as_torch_does(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, 5, device=device, dtype=dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = normfused.BatchNorm2d(3, device=device)(x), nn.BatchNorm2d(3, device=device)(x)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_running_var_is_unbiased_and_output_biased(device: torch.device) -> None:
    x = torch.tensor([[1.0], [3.0]], device=device)
    running_mean, running_var = torch.zeros(1, device=device), torch.zeros(1, device=device)
    y = batch_norm(x, running_mean, running_var, training=True, momentum=1.0, eps=0.0)
    assert running_mean.item() == 2
    assert running_var.item() == 2  # 2 / (2 - 1)
    assert y.flatten().tolist() == [-1, 1]  # normalized with the biased variance, which is 1


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_parameters_and_buffers_of_any_stride(device: torch.device, strided: bool) -> None:
    arguments = make_arguments((5, 4, 3), torch.float32, torch.float32, device)
    expected = run(batch_norm, arguments, training=True)

    def place(t: torch.Tensor) -> torch.Tensor:
        base = t.new_full((4, 2), 7.0) if strided else t.new_empty(4, 1)
        return base[:, 0].copy_(t)

    names = ("running_mean", "running_var", "weight", "bias")
    placed = {name: place(getattr(arguments, name)) for name in names}
    y = batch_norm(arguments.input, **placed, training=True)
    assert_same_bits(y, expected.output)
    for name in ("running_mean", "running_var"):
        assert_same_bits(placed[name], getattr(expected, name))
        if strided:
            assert (placed[name].as_strided((4,), (2,), 1) == 7).all()  # the gaps are not written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0, 5), (0, 3, 4, 5), (0, 3, 4, 5, 6), (4, 0, 5)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batches(
    device: torch.device, shape: tuple[int, ...], layout: str, training: bool, dtype: torch.dtype
) -> None:
    x = lay_out(torch.empty(shape, device=device, dtype=dtype), layout).requires_grad_()
    module = module_for(x).train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for parameter in (module.weight, module.bias):
        assert parameter.grad is not None
        assert_same_bits(parameter.grad, torch.zeros_like(parameter))
    for name, value in module.state_dict().items():
        assert_same_bits(value, before[name])


def test_empty_batch_needs_no_momentum(device: torch.device) -> None:
    module = normfused.BatchNorm1d(3, momentum=None, device=device)
    assert module(torch.empty(0, 3, device=device)).shape == (0, 3)
    assert module.num_batches_tracked == 0
    assert module.running_mean.tolist() == [0, 0, 0]
    assert module.running_var.tolist() == [1, 1, 1]


AMBIGUOUS = [(4, 1, 3, 3), (4, 3, 1, 1), (1, 3, 4, 4), (1, 3, 1, 4), (4, 1, 1, 1), (2, 1, 1, 5)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "torch channels_last"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 6), *AMBIGUOUS], ids=str)
def test_dense_formats_are_preserved(device: torch.device, shape: tuple[int, ...], layout: str, training: bool) -> None:
    x = torch.randn(shape, device=device)
    if layout == "torch channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.to(memory_format=formats.get(x.dim(), torch.contiguous_format))
    else:
        x = lay_out(x, layout)
    for grad_layout in LAYOUTS:
        x = x.detach().requires_grad_()
        y = module_for(x).train(training)(x)
        (grad_input,) = torch.autograd.grad(y, x, lay_out(torch.randn(shape, device=device), grad_layout))
        assert y.stride() == x.stride()
        assert grad_input.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_other_formats_become_those_of_torch(
    device: torch.device, layout: str, channels_last: bool, training: bool
) -> None:
    x = torch.randn(4, 6, 5, 6, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        x = {"permuted": x.transpose(2, 3), "sliced": x[:, 1:5], "expanded": x[:1].expand(4, 6, 5, 6)}[layout]
    else:
        x = lay_out(x, layout)
    module = module_for(x).train(training)
    theirs = nn.BatchNorm2d(x.size(1), device=device).train(training)
    y, expected = module(x), theirs(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", AMBIGUOUS, ids=str)
def test_ambiguous_shapes_are_as_close_as_torch(
    device: torch.device, shape: tuple[int, ...], layout: str, training: bool
) -> None:
    for grad_layout in ("contiguous", "channels_last", "expanded"):
        arguments = make_arguments(shape, torch.float32, torch.float32, device, layout, grad_layout)
        ours, theirs = (run(f, arguments, training) for f in (batch_norm, F.batch_norm))
        assert_as_close_as_torch(ours, theirs, arguments, training)


def allocated(function) -> int:
    """The total number of bytes that a call allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        keep = function()
    del keep
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(max(e.nbytes(), 0) for e in events)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("shape", [(8, 16, 512), (8, 16, 32, 32), (8, 16, 8, 8, 8), (4096, 16)], ids=str)
def test_no_hidden_copy(shape: tuple[int, ...], layout: str, training: bool) -> None:
    x = lay_out(torch.randn(shape), layout).requires_grad_()
    grad_output = lay_out(torch.randn(shape), layout)
    module = module_for(x).train(training)
    size, small = x.numel() * 4, 4096 + 16 * 64
    assert size <= allocated(lambda: module(x)) <= size + small
    y = module(x)
    assert size <= allocated(lambda: torch.autograd.grad(y, x, grad_output)) <= size + small


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((65536, 1, 1, 1), "contiguous"),
        ((70000, 1, 2), "contiguous"),
        ((131072, 1), "contiguous"),
        ((200704, 32), "contiguous"),
        ((1, 70000, 2, 2), "contiguous"),
        ((1, 70000, 2, 2), "channels_last"),
    ],
    ids=str,
)
def test_large_and_uneven_shapes(device: torch.device, shape: tuple[int, ...], layout: str) -> None:
    arguments = make_arguments(shape, torch.float32, torch.float32, device, layout, layout)
    for training in (True, False):
        ours = run(batch_norm, arguments, training)
        exact = make_arguments((2, shape[1]), torch.float64, torch.float64, device)
        for name in ("input", "grad_output", "weight", "bias", "running_mean", "running_var"):
            setattr(exact, name, getattr(arguments, name).double().contiguous())
        theirs = run(F.batch_norm, exact, training)
        # Sums of many values of both signs grow with the square root of their number, and so does the bound.
        tolerance = 1e-5 * (arguments.input.numel() / shape[1]) ** 0.5
        close = torch.testing.assert_close
        close(ours.output.double(), theirs.output, rtol=1e-5, atol=1e-5)
        close(ours.grad_input.double(), theirs.grad_input, rtol=1e-4, atol=1e-4)
        close(ours.grad_weight.double(), theirs.grad_weight, rtol=1e-5, atol=tolerance)
        close(ours.grad_bias.double(), theirs.grad_bias, rtol=1e-5, atol=tolerance)
        close(ours.running_mean.double(), theirs.running_mean, rtol=1e-6, atol=1e-6)
        close(ours.running_var.double(), theirs.running_var, rtol=1e-6, atol=1e-6)


def test_buffers_may_change_before_backward(device: torch.device) -> None:
    arguments = make_arguments((6, 3, 4), torch.float32, torch.float32, device)
    for training in (True, False):
        expected = run(batch_norm, arguments, training)
        x = arguments.input.detach().requires_grad_()
        weight = arguments.weight.detach().requires_grad_()
        running_mean, running_var = arguments.running_mean.clone(), arguments.running_var.clone()
        y = batch_norm(x, running_mean, running_var, weight, arguments.bias, training)
        running_mean.fill_(1e3)
        running_var.fill_(1e6)
        grad_input, grad_weight = torch.autograd.grad(y, (x, weight), arguments.grad_output)
        assert_same_bits(grad_input, expected.grad_input)
        assert_same_bits(grad_weight, expected.grad_weight)


def test_two_forwards_then_two_backwards(device: torch.device) -> None:
    module = normfused.BatchNorm1d(3, device=device).double()
    theirs = nn.BatchNorm1d(3, device=device).double()
    inputs = [torch.randn(8, 3, device=device, dtype=torch.float64) for _ in range(2)]
    for m in (module, theirs):
        outputs = [m(x) for x in inputs]
        sum((y**3).sum() for y in outputs).backward()
    torch.testing.assert_close(module.weight.grad, theirs.weight.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(module.running_var, theirs.running_var, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("needs_extension")  # the fallback saves a copy in float64
def test_overwritten_input_is_detected(device: torch.device) -> None:
    x = torch.randn(8, 3, device=device)
    weight = torch.ones(3, device=device, requires_grad=True)
    y = batch_norm(x, None, None, weight, None, True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_cumulative_average_equals_torch(device: torch.device, dtype: torch.dtype) -> None:
    ours = normfused.BatchNorm1d(3, momentum=None, device=device)
    theirs = nn.BatchNorm1d(3, momentum=None, device=device)
    if dtype == torch.float64:
        ours, theirs = ours.double(), theirs.double()
    batches = [torch.randn(6, 3, device=device).to(dtype) + i for i in range(5)]
    for count, x in enumerate(batches, 1):
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)
        assert ours.num_batches_tracked == count
    means = torch.stack([x.double().mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(ours.running_mean.double(), means, rtol=1e-5, atol=1e-5)


def test_counter_counts_in_place(device: torch.device) -> None:
    module = normfused.BatchNorm1d(3, device=device)
    counter = module.num_batches_tracked
    x = torch.randn(4, 3, device=device)
    versions = [t._version for t in (counter, module.running_mean, module.running_var)]
    for _ in range(3):
        module(x)
    module.eval()(x)
    assert module.num_batches_tracked is counter
    assert counter.dtype == torch.int64
    assert counter.dim() == 0
    assert counter.item() == 3
    # Autograd detects writes in place by these versions.
    after = [t._version for t in (counter, module.running_mean, module.running_var)]
    assert all(b > a for a, b in zip(versions, after, strict=True))


def test_functional_counts_too(device: torch.device) -> None:
    counter = torch.tensor(41, device=device)
    x = torch.randn(4, 3, device=device)
    buffers = torch.zeros(3, device=device), torch.ones(3, device=device)
    batch_norm(x, *buffers, training=True, num_batches_tracked=counter)
    assert counter.item() == 42
    batch_norm(x, *buffers, training=False, num_batches_tracked=counter)
    assert counter.item() == 42


# Few channels with long rows, short rows, channels last, and a size that no number of threads divides evenly.
DETERMINISM_SHAPES = [(4, 2, 120, 120), (16, 96, 7, 7), (2000, 24), (3, 1, 131, 127)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", DETERMINISM_SHAPES, ids=str)
def test_twenty_runs_are_bitwise_identical(
    device: torch.device, shape: tuple[int, ...], layout: str, training: bool
) -> None:
    arguments = make_arguments(shape, torch.float32, torch.float32, device, layout, layout)
    first = run(batch_norm, arguments, training)
    for _ in range(19):
        again = run(batch_norm, arguments, training)
        for name, value in vars(first).items():
            assert_same_bits(getattr(again, name), value)


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", DETERMINISM_SHAPES, ids=str)
def test_results_are_bitwise_independent_of_thread_count(shape: tuple[int, ...], layout: str, training: bool) -> None:
    arguments = make_arguments(shape, torch.float32, torch.float32, torch.device("cpu"), layout, layout)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(batch_norm, arguments, training))
    for other in results[1:]:
        for name, value in vars(results[0]).items():
            assert_same_bits(getattr(other, name), value)


def test_deterministic_algorithms_are_allowed(device: torch.device) -> None:
    arguments = make_arguments((4, 3, 5), torch.float32, torch.float32, device)
    expected = run(batch_norm, arguments, training=True)
    torch.use_deterministic_algorithms(True)
    try:
        again = run(batch_norm, arguments, training=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in vars(expected).items():
        assert_same_bits(getattr(again, name), value)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivatives_equal_torch(device: torch.device, training: bool) -> None:
    arguments = make_arguments((5, 3, 4), torch.float64, torch.float64, device)
    results = []
    for function in (batch_norm, F.batch_norm):
        x, w, b = (t.detach().clone().requires_grad_() for t in (arguments.input, arguments.weight, arguments.bias))
        buffers = arguments.running_mean.clone(), arguments.running_var.clone()
        y = function(x, *buffers, w, b, training)
        grads = torch.autograd.grad((y**3).sum(), (x, w, b), create_graph=True)
        results.append(torch.autograd.grad(sum((g**2).sum() for g in grads), (x, w, b)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
