"""Local response normalization compared with torch's and with long double. Runs on the fallback too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from common import LAYOUTS, assert_same_bits, dtype_id, lay_out
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused.functional import local_response_norm

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3, 7, 11), (2, 5, 6, 7), (2, 4, 3, 2, 5), (4, 70, 3, 3), (2, 3, 40, 40), (5, 33, 1), (2, 1, 4), (1, 130, 33)]
Options = dict[str, float]
BETAS = [0.75, 0.5, 1.0, 0.6, 2.3, -0.4, 0.0]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def torch_in_float32(x: Tensor, size: int, **options: float) -> Tensor:
    """torch's function, via float32 for narrower dtypes, whose pooling it lacks on the CPU."""
    return F.local_response_norm(x.to(torch.promote_types(x.dtype, torch.float32)), size, **options).to(x.dtype)


def run(function: Callable[..., Tensor], x: Tensor, grad_output: Tensor, size: int, options: Options) -> list[Tensor]:
    """Output and gradient."""
    x = x.detach().requires_grad_()
    y = function(x, size, **options)
    return [y.detach(), *torch.autograd.grad(y, x, grad_output)]


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().astype(np.longdouble)


def window_sums(values: np.ndarray, left: int, right: int) -> np.ndarray:
    channels = values.shape[1]
    windows = [values[:, max(c - left, 0) : c + right + 1].sum(1) for c in range(channels)]
    return np.stack(windows, 1)


def assert_as_close_as_torch(x: Tensor, grad_output: Tensor, size: int, options: Options) -> None:
    """The errors of output and gradient are at most 1.05 times those of torch, plus 4 ulp of the natural scale.

    Scale and ulp are those of assert_as_close_as_torch in common.py.
    """
    alpha, beta, k = (np.longdouble(options.get(n, d)) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("k", 1.0)))
    values, grad = exact(x), exact(grad_output)
    left, right = size // 2, (size - 1) // 2
    scale = alpha / size
    base = k + scale * window_sums(values**2, left, right)
    factor = base**-beta
    shares = grad * values * factor / base
    window_term = 2 * scale * beta * values * window_sums(shares, right, left)
    magnitude = abs(grad * factor) + abs(2 * scale * beta * values) * window_sums(abs(shares), right, left)
    truths = [(values * factor, abs(values * factor)), (grad * factor - window_term, magnitude)]

    ours, theirs = (run(f, x, grad_output, size, options) for f in (local_response_norm, torch_in_float32))
    arithmetic = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    for name, got, torch_got, (truth, magnitude) in zip(("output", "gradient"), ours, theirs, truths, strict=True):
        assert got.shape == x.shape
        assert got.dtype == x.dtype
        tiny = torch.finfo(got.dtype).smallest_normal
        error, torch_error = (abs(exact(t) - truth) / (magnitude + tiny) for t in (got, torch_got))
        torch_error[np.isnan(torch_error)] = np.inf
        bound = 1.05 * torch_error.max() + 4 * arithmetic + torch.finfo(got.dtype).eps / 2
        assert error.max() <= bound, f"{name}: {error.max():.3g}, torch's {torch_error.max():.3g}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_is_as_close_as_torch(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    x = lay_out((torch.randn(shape) * 2 + 1).to(device, dtype), layout)
    for grad_layout in ("contiguous", "channels_last", "sliced"):
        grad_output = lay_out(torch.randn(shape).to(device, dtype), grad_layout)
        assert_as_close_as_torch(x, grad_output, 5, {"alpha": 0.5})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 7, 5, 9), [*range(1, 18), 1000]),
        ((3, 18, 17), range(1, 40)),
        ((2, 6, 3, 2, 3), range(1, 16)),
        ((2, 200, 5), [20, 31, 48, 100, 201, 399, 403]),  # more than a block on CUDA can hold
    ],
    ids=str,
)
def test_every_size_of_window(device: torch.device, shape: tuple[int, ...], sizes: Sequence[int], layout: str) -> None:
    x, grad_output = (lay_out(double(*shape).to(device), layout) for _ in range(2))
    for size in sizes:
        for ours, theirs in zip(
            run(local_response_norm, x, grad_output, size, {"alpha": 1.0}),
            run(F.local_response_norm, x, grad_output, size, {"alpha": 1.0}),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("beta", BETAS)
def test_every_option_is_as_close_as_torch(device: torch.device, beta: float, dtype: torch.dtype, layout: str) -> None:
    x = lay_out((torch.rand(3, 10, 6, 7) * 9 + 0.1).to(device, dtype), layout)
    grad_output = torch.randn(3, 10, 6, 7).to(device, dtype)
    for size, alpha, k in ((5, 1e-4, 1.0), (4, 2.0, 0.5), (3, 1.0, 0.0), (1, 30.0, 2.0)):
        assert_as_close_as_torch(x, grad_output, size, {"alpha": alpha, "beta": beta, "k": k})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("beta", BETAS)
def test_powers_of_all_magnitudes(device: torch.device, beta: float, layout: str) -> None:
    """With a window of one value and k = 0, the factor is a power. Tested over the whole range of float32."""
    magnitudes = torch.logspace(-18, 18, 5000, dtype=torch.float64).float()
    x = lay_out((magnitudes * torch.randn(5000).sign()).view(2, 50, 50).to(device), layout)
    y = local_response_norm(x, 1, alpha=1.0, beta=beta, k=0.0)
    # CUDA's power has a float32 exponent, as torch's does.
    cuda = device.type == "cuda" or normfused.info()["cpu_capability"] == "cuda"
    factor = x.double().square().pow(-torch.tensor(beta, dtype=torch.float32 if cuda else torch.float64).item())
    limits = torch.finfo(torch.float32)
    inside = (factor > limits.smallest_normal) & (factor < limits.max)
    torch.testing.assert_close(y.double()[inside], (x.double() * factor)[inside], rtol=3e-7, atol=0)
    assert y[factor >= limits.max].isinf().all()
    assert (y[factor <= limits.smallest_normal].abs() < 1e-19).all()


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6, 2.3, -0.4, 2.0, 3.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_special_values_give_the_results_of_torch(device: torch.device, dtype: torch.dtype, beta: float) -> None:
    """Zeros, infinities, NaN, overflow; and negative bases, whose power is defined for integer beta."""
    special = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e30, -1e200, torch.inf, -torch.inf, torch.nan, 3.0])
    plain = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.3])
    cases = [(special, 1.0, 0.0), (special, 0.3, 1.0), (plain, -1.0, 0.5), (plain, 0.0, -2.0), (plain, 0.0, 0.0)]
    for values, alpha, k in cases:
        x = values.to(device, dtype).repeat(7).view(1, 7, -1)
        for size in (1, 2):
            options = {"alpha": alpha, "beta": beta, "k": k}
            ours, theirs = local_response_norm(x, size, **options), F.local_response_norm(x, size, **options)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


def test_half_precision_does_not_overflow(device: torch.device) -> None:
    x = torch.full((2, 8, 5, 5), 2000.0, device=device, dtype=torch.float16)
    expected = F.local_response_norm(x.double(), 5)
    torch.testing.assert_close(local_response_norm(x, 5).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 40, 57, 31), (9, 300, 7, 7), (3, 6, 200, 200)], ids=str)
def test_larger_shapes_and_any_number_of_threads(shape: tuple[int, ...], layout: str) -> None:
    """Several blocks per plane, tails, several blocks per task; bitwise identical for any number of threads."""
    x, grad_output = (lay_out(torch.randn(shape), layout) for _ in range(2))
    options = {"alpha": 1.0}
    expected = run(F.local_response_norm, x.double(), grad_output.double(), 5, options)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(local_response_norm, x, grad_output, 5, options))
    for result in results:
        for ours, first, theirs in zip(result, results[0], expected, strict=True):
            assert_same_bits(ours, first)
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5, 5), (4, 3, 0), (0, 3, 2, 0, 1)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    y = local_response_norm(x, 5)
    assert y.shape == shape
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.shape == second.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_layout_of_the_input(device: torch.device, layout: str) -> None:
    x = lay_out(torch.randn(4, 3, 6, 5, device=device), layout)
    y, grad = run(local_response_norm, x, torch.randn_like(x), 5, {})
    last = layout == "channels_last"
    for result in (y, grad):
        assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.0, "beta": 0.6, "k": 2.0}, {"beta": 1.0, "k": 0.1}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_gradcheck_and_gradgradcheck(device: torch.device, size: int, options: Options, layout: str) -> None:
    x = lay_out(double(2, 5, 3).to(device) + 3, layout).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return local_response_norm(x, size, **options)

    torch.autograd.gradcheck(function, x)
    torch.autograd.gradgradcheck(function, x)


def test_third_derivative(device: torch.device) -> None:
    results = []
    values = double(2, 5, 3).to(device)
    for function in (local_response_norm, F.local_response_norm):
        x = values.clone().requires_grad_()
        y = function(x, 3, alpha=1.0)
        for _ in range(3):
            (y,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        results.append(y)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("needs_extension")
def test_only_the_input_is_saved_for_backward(device: torch.device) -> None:
    x = torch.randn(2, 5, 3, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        local_response_norm(x, 3)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_transforms(device: torch.device) -> None:
    x, t = double(4, 3, 5).to(device), double(4, 3, 5).to(device)
    ours, theirs = (lambda x, f=f: f(x, 3, alpha=1.0) for f in (local_response_norm, F.local_response_norm))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (t,)), torch.func.jvp(theirs, (x,), (t,)))
    batched = x.expand(2, 4, 3, 5)
    torch.testing.assert_close(torch.func.vmap(ours)(batched), torch.stack([theirs(x)] * 2))


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (0, 3, 2)], ids=str)
def test_opcheck(shape: tuple[int, ...], layout: str) -> None:
    x, grad = (lay_out(torch.randn(shape), layout).requires_grad_() for _ in range(2))
    ops = torch.ops.normfused
    torch.library.opcheck(ops.local_response_norm.default, (x, 5, 1e-4, 0.75, 1.0))
    torch.library.opcheck(ops.local_response_norm_backward.default, (grad, x, 5, 1e-4, 0.75, 1.0))


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_is_eager(layout: str, backend: str) -> None:
    torch._dynamo.reset()
    module = normfused.LocalResponseNorm(4, alpha=0.5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((4, 6, 5, 7), (3, 6, 8, 4), (5, 6, 3, 3)):
        x, grad_output = (lay_out(torch.randn(shape), layout) for _ in range(2))
        results = []
        for function in (compiled, module):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.backward(grad_output)
            results.append((y, leaf.grad))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
            assert a.stride() == b.stride()


def test_module(device: torch.device) -> None:
    ours, theirs = normfused.LocalResponseNorm(5, beta=0.6, k=2.0), nn.LocalResponseNorm(5, beta=0.6, k=2.0)
    assert isinstance(ours, nn.LocalResponseNorm)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == {}
    assert repr(normfused.LocalResponseNorm(2)) == "LocalResponseNorm(2, alpha=0.0001, beta=0.75, k=1.0)"
    x = torch.randn(3, 8, 5, 4, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), ours))
    assert_same_bits(traced(x), ours(x.relu()))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is normfused.LocalResponseNorm
        assert repr(other) == repr(ours)
        assert_same_bits(other(x), ours(x))
    assert ours(torch.empty(2, 3, 4, device="meta")).is_meta


GOOD: dict[str, Any] = {"input": torch.zeros(2, 3, 4), "size": 5}
DIMS = "input needs at least 3 dimensions (N, C, ...), got shape"
FLOATING = "input must be float32, float64, float16 or bfloat16, got"
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    ({"input": torch.zeros(2, 3)}, ValueError, f"{DIMS} (2, 3)"),
    ({"input": torch.zeros(())}, ValueError, f"{DIMS} ()"),
    ({"input": torch.zeros(2, 3, 4).int()}, TypeError, f"{FLOATING} torch.int32"),
    ({"input": torch.zeros(2, 3, 4, dtype=torch.complex64)}, TypeError, f"{FLOATING} torch.complex64"),
    ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    ({"size": -3}, ValueError, "size must be at least 1, got -3"),
    ({"size": 2.5}, TypeError, "size must be an int, got float"),
    ({"size": "5"}, TypeError, "size must be an int, got str"),
    ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
    ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
    ({"k": [1.0]}, TypeError, "k must be a number, got list"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD, ids=[f"{i}-{case[2][:40]}" for i, case in enumerate(BAD)])
def test_error_messages(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        local_response_norm(**{**GOOD, **changed})
    assert str(error.value) == f"local_response_norm: {message}"


def test_cuda_tensor_and_cpu_build() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if normfused.info()["cuda"]:
        pytest.skip("this build has CUDA")
    with pytest.raises(RuntimeError, match=r"^normfused was built without CUDA \(.+\); to get it: .+"):
        local_response_norm(torch.zeros(2, 3, 4, device="cuda"), 5)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_output": torch.zeros(2, 3, 5)}, "grad_output has shape"),
        ({"grad_output": torch.zeros(2, 3, 4).double()}, "grad_output is Double"),
        ({"grad_output": torch.zeros(2, 3), "input": torch.zeros(2, 3)}, "at least 3 dimensions"),
        ({"size": 0}, "size must be at least 1"),
        ({"grad_output": torch.zeros(2, 3, 4).int(), "input": torch.zeros(2, 3, 4).int()}, "got Int"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_backward_operator_refuses(changed: dict[str, Any], message: str) -> None:
    good = {"grad_output": torch.zeros(2, 3, 4), "input": torch.zeros(2, 3, 4), "size": 5}
    backward = torch.ops.normfused.local_response_norm_backward
    assert backward(*good.values(), 1e-4, 0.75, 1.0).shape == (2, 3, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        backward(*{**good, **changed}.values(), 1e-4, 0.75, 1.0)
