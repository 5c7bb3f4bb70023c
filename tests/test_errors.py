"""Invalid input raises the documented exception and writes nothing. Runs on the fallback too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from common import assert_same_bits, dtype_id
from hypothesis import strategies as st
from torch import Tensor, nn

import normfused
from normfused.functional import batch_norm

SINGLE = (
    "expected more than 1 value per channel when training, got input of shape {}; use a bigger batch, "
    "put the module in eval mode, or drop the last incomplete batch (DataLoader(drop_last=True))"
)


def arguments(shape: tuple[int, ...] = (4, 3, 5), dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    """Valid arguments of batch_norm, except for the given ones."""
    channels = shape[1]
    good: dict[str, Any] = {
        "input": torch.randn(shape).to(dtype),
        "running_mean": torch.randn(channels).to(dtype),
        "running_var": torch.rand(channels).to(dtype),
        "weight": torch.randn(channels).to(dtype),
        "bias": torch.randn(channels).to(dtype),
        "training": True,
        "num_batches_tracked": torch.tensor(5),
    }
    return {**good, **changed}


def assert_raises_and_writes_nothing(
    call: Callable[[], object], tensors: list[Tensor], kind: type[Exception] | tuple[type[Exception], ...]
) -> str:
    """Returns the message of the exception."""
    before = [t.clone() for t in tensors]
    with pytest.raises(kind) as error:
        call()
    for tensor, value in zip(tensors, before, strict=True):
        assert_same_bits(tensor, value)
    return str(error.value)


ROWS: list[tuple[dict[str, Any], type[Exception], str]] = []


def row(kind: type[Exception], message: str, **changed: Any) -> None:
    ROWS.append((arguments(**changed), kind, message))


row(ValueError, "batch_norm: " + SINGLE.format((1, 4)), shape=(1, 4))
row(ValueError, "batch_norm: " + SINGLE.format((1, 4, 1, 1)), shape=(1, 4, 1, 1))
row(ValueError, "batch_norm: input needs at least 2 dimensions (N, C, ...), got shape (3,)", input=torch.zeros(3))
row(ValueError, "batch_norm: input needs at least 2 dimensions (N, C, ...), got shape ()", input=torch.zeros(()))
for name in ("weight", "bias", "running_mean", "running_var"):
    for size in (2, 4, 0, 1):
        text = f"batch_norm: {name} has {size} elements, but input of shape (4, 3, 5) has 3 channels (dim 1)"
        row(ValueError, text, **{name: torch.ones(size)})
    for shape in ((3, 3), (3, 1), ()):
        row(ValueError, f"batch_norm: {name} must have shape (3,), got {shape}", **{name: torch.ones(shape)})
    row(ValueError, f"batch_norm: {name} is on meta, but input is on cpu", **{name: torch.ones(3, device="meta")})
    for dtype, allowed, wrong in (
        (torch.float32, "torch.float32", torch.float64),
        (torch.float32, "torch.float32", torch.bfloat16),
        (torch.float64, "torch.float64", torch.float32),
        (torch.float16, "torch.float32 or torch.float16", torch.bfloat16),
        (torch.bfloat16, "torch.float32 or torch.bfloat16", torch.float64),
        (torch.bfloat16, "torch.float32 or torch.bfloat16", torch.int64),
    ):
        text = f"batch_norm: {name} must be {allowed} for {dtype} input, got {wrong}"
        row(TypeError, text, dtype=dtype, **{name: torch.ones(3, dtype=wrong)})
for training in (True, False):
    for name, given in (("running_mean", "running_var"), ("running_var", "running_mean")):
        text = f"batch_norm: running_mean and running_var must be given together, got only {given}"
        row(ValueError, text, training=training, **{name: None})
        text = f"batch_norm: {name} requires grad, but running statistics are not differentiated"
        row(ValueError, text, training=training, **{name: torch.ones(3, requires_grad=True)})
    for eps in (-1e-5, -1.0, float("inf"), float("nan")):
        text = f"batch_norm: eps must be a non-negative finite number, got {eps}"
        row(ValueError, text, eps=eps, training=training)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        text = f"batch_norm: input must be float32, float64, float16 or bfloat16, got {dtype}"
        row(TypeError, text, input=torch.zeros(4, 3, 5, dtype=dtype), training=training)
for momentum in (float("nan"), float("inf")):
    row(ValueError, f"batch_norm: momentum must be a finite number or None, got {momentum}", momentum=momentum)
one = torch.ones(3)
row(ValueError, "batch_norm: running_mean and running_var are the same tensor", running_mean=one, running_var=one)
row(
    ValueError,
    "batch_norm: expected more than 1 value per channel without running statistics, got input of shape (1, 4); use a "
    "bigger batch, keep running statistics, or drop the last incomplete batch (DataLoader(drop_last=True))",
    shape=(1, 4),
    running_mean=None,
    running_var=None,
)
row(TypeError, "batch_norm: input must be a tensor, got list", input=[[1.0, 2.0]])
for name in ("weight", "bias", "running_mean", "running_var"):
    row(TypeError, f"batch_norm: {name} must be a tensor or None, got list", **{name: [1.0, 1.0, 1.0]})
row(
    ValueError,
    "batch_norm: running_mean and running_var are needed when training=False",
    training=False,
    running_mean=None,
    running_var=None,
)
for counter in (torch.tensor(5.0), torch.tensor(5, dtype=torch.int32), torch.tensor([5])):
    row(
        ValueError,
        f"batch_norm: num_batches_tracked must be a 0-d int64 tensor, got {counter.dtype} "
        f"of shape {tuple(counter.shape)}",
        num_batches_tracked=counter,
    )
row(
    ValueError,
    "batch_norm: momentum=None (cumulative average) needs num_batches_tracked",
    momentum=None,
    num_batches_tracked=None,
)


@pytest.mark.parametrize(("given", "kind", "message"), ROWS, ids=[f"{i}-{r[2][12:70]}" for i, r in enumerate(ROWS)])
def test_error_messages(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    tensors = [t for t in given.values() if isinstance(t, Tensor) and not t.is_meta]
    assert assert_raises_and_writes_nothing(lambda: batch_norm(**given), tensors, kind) == message


@pytest.mark.parametrize("requires_grad", [False, True])
def test_good_arguments_pass(requires_grad: bool) -> None:
    given = arguments()
    given["input"].requires_grad_(requires_grad)
    assert batch_norm(**given).requires_grad == requires_grad
    assert given["num_batches_tracked"] == 6


DIMENSIONS = [
    (normfused.BatchNorm1d, "2D or 3D", [(3,), (2, 3, 4, 5), ()]),
    (normfused.BatchNorm2d, "4D", [(2, 3), (2, 3, 4), (2, 3, 4, 5, 6)]),
    (normfused.BatchNorm3d, "5D", [(2, 3), (2, 3, 4, 5), (2, 3, 1, 1, 1, 1)]),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cls", "dims", "shape"), [(c, d, s) for c, d, shapes in DIMENSIONS for s in shapes], ids=str)
def test_number_of_dimensions(
    device: torch.device, cls: type, dims: str, shape: tuple[int, ...], training: bool
) -> None:
    module = cls(3, device=device).train(training)
    message = assert_raises_and_writes_nothing(
        lambda: module(torch.zeros(shape, device=device)), [*module.state_dict().values()], ValueError
    )
    assert message == f"{cls.__name__}: expected a {dims} input, got {len(shape)}D input of shape {shape}"


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_wrong_channel_count(device: torch.device, training: bool) -> None:
    module = normfused.BatchNorm2d(3, device=device).train(training)
    message = assert_raises_and_writes_nothing(
        lambda: module(torch.zeros(2, 4, 5, 5, device=device)), [*module.state_dict().values()], ValueError
    )
    assert message == "batch_norm: weight has 3 elements, but input of shape (2, 4, 5, 5) has 4 channels (dim 1)"


def test_cuda_tensor_and_cpu_build() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if normfused.info()["cuda"]:
        pytest.skip("this build has CUDA")
    x = torch.zeros(4, 3, device="cuda")
    with pytest.raises(RuntimeError, match=r"^normfused was built without CUDA \(.+\); to get it: .+"):
        normfused.BatchNorm1d(3, device="cuda")(x)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_buffer_that_overlaps_itself(name: str) -> None:
    """The elements of such a buffer share memory, so that no update is well defined."""
    given = arguments(**{name: torch.ones(1).expand(3)})
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    assert_raises_and_writes_nothing(lambda: batch_norm(**given), tensors, (ValueError, RuntimeError))


def test_counter_on_another_device() -> None:
    given = arguments(num_batches_tracked=torch.tensor(0, device="meta"))
    tensors = [given["running_mean"], given["running_var"]]
    message = assert_raises_and_writes_nothing(lambda: batch_norm(**given), tensors, ValueError)
    assert message == "batch_norm: num_batches_tracked is on meta, but input is on cpu"


def test_inference_tensors_are_not_written_outside_inference_mode() -> None:
    with torch.inference_mode():
        module = normfused.BatchNorm1d(3)
        theirs = nn.BatchNorm1d(3)
        x = torch.randn(4, 3)
        torch.testing.assert_close(module(x), theirs(x))
    y = torch.randn(4, 3)
    with pytest.raises(RuntimeError):
        theirs(y)
    buffers = [module.running_mean, module.running_var, module.num_batches_tracked]
    assert_raises_and_writes_nothing(lambda: module(y), buffers, RuntimeError)


ANY_DTYPE = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
dtypes = st.sampled_from(ANY_DTYPE) | st.just(torch.float32)
sizes = st.integers(0, 5)


@st.composite
def vectors(draw: st.DrawFn, channels: int, dtype: torch.dtype) -> Tensor | None:
    """Usually a valid parameter or buffer, sometimes None, or of another shape, dtype, stride or device."""
    kind = draw(st.sampled_from(["good", "good", "good", "none", "shape", "dtype", "strided", "meta"]))
    if kind == "none":
        return None
    if kind == "shape":
        return torch.ones(draw(st.lists(sizes, max_size=3)), dtype=dtype)
    if kind == "dtype":
        return torch.ones(channels, dtype=draw(dtypes))
    if kind == "strided":
        return torch.ones(2 * channels, dtype=dtype)[::2]
    return torch.ones(channels, dtype=dtype, device="meta" if kind == "meta" else "cpu")


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(st.lists(sizes, min_size=2, max_size=5) | st.lists(sizes, max_size=6))
    dtype = draw(dtypes)
    x = torch.ones(shape, dtype=dtype)
    if len(shape) > 2 and draw(st.booleans()):
        x = x.transpose(1, -1)
    channels = x.size(1) if x.dim() > 1 else 3
    return {
        "input": x,
        **{n: draw(vectors(channels, dtype)) for n in ("running_mean", "running_var", "weight", "bias")},
        "training": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.1, None, 0.0, 1.0])),
        "eps": draw(st.sampled_from([1e-5, 1e-5, 0.0, -1.0, float("nan"), float("inf")])),
        "num_batches_tracked": draw(
            st.sampled_from([None, torch.tensor(3), torch.tensor(3.0), torch.tensor([3])]).map(
                lambda t: None if t is None else t.clone()
            )
        ),
    }


fuzz = hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
)


def assert_good_or_refused(
    call: Callable[[], Tensor], given: dict[str, Any], kinds: tuple[type[Exception], ...]
) -> None:
    tensors = [t for t in given.values() if isinstance(t, Tensor) and not t.is_meta]
    before = [t.clone() for t in tensors]
    try:
        y = call()
    except kinds:
        for tensor, value in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value)
    else:
        assert y.shape == given["input"].shape
        assert y.dtype == given["input"].dtype
        assert y.device == given["input"].device
        assert torch.equal(given["input"], before[0])


@fuzz
@hypothesis.given(calls())
def test_fuzz(given: dict[str, Any]) -> None:
    assert_good_or_refused(lambda: batch_norm(**given), given, (ValueError, TypeError))


@pytest.mark.usefixtures("needs_extension")
@fuzz
@hypothesis.given(calls())
def test_fuzz_operators(given: dict[str, Any]) -> None:
    """The operators refuse bad arguments, instead of crashing, without the checks of functional.py too."""
    given = {n: t for n, t in given.items() if not (isinstance(t, Tensor) and t.is_meta)}
    names = ("input", "weight", "bias", "running_mean", "running_var")
    tensors = [given.get(name) for name in names]
    ops = torch.ops.normfused
    kinds = (ValueError, TypeError, RuntimeError)
    if given["training"]:
        rest = (given.get("num_batches_tracked"), given["momentum"], given["eps"])
        assert_good_or_refused(lambda: ops.batch_norm_training(*tensors, *rest)[0], given, kinds)
    else:
        assert_good_or_refused(lambda: ops.batch_norm_inference(*tensors, given["eps"])[0], given, kinds)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_output": torch.zeros(4, 3, 6)}, "grad_output has shape"),
        ({"grad_output": torch.zeros(4, 3, 5).double()}, "grad_output is Double"),
        ({"statistics": torch.zeros(2, 3)}, "statistics must be"),
        ({"statistics": torch.zeros(2, 4).double()}, "statistics must be"),
        ({"statistics": torch.zeros(3, 2).double().t()}, "statistics must be"),
        ({"weight": torch.zeros(4)}, "weight has shape"),
        ({"input": torch.zeros(4)}, "at least 2 dimensions"),
        ({"input": torch.zeros(4, 3, 5, dtype=torch.int32)}, "got Int"),
    ],
    ids=lambda v: dtype_id(v) if isinstance(v, str) else "",
)
def test_backward_operator(changed: dict[str, Tensor], message: str) -> None:
    good = {
        "grad_output": torch.zeros(4, 3, 5),
        "input": torch.zeros(4, 3, 5),
        "weight": torch.zeros(3),
        "statistics": torch.ones(2, 3).double(),
    }
    backward = torch.ops.normfused.batch_norm_backward
    assert [t.shape for t in backward(*good.values(), True, [True] * 4)] == [(4, 3, 5), (3,), (3,), (4, 3, 5)]
    with pytest.raises((ValueError, TypeError), match=message):
        backward(*{**good, **changed}.values(), True, [True] * 4)
