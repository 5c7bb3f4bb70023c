"""The cases of the benchmarks: operations, shapes, dtypes and layouts, and the bytes that each operation moves."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import normfused
from normfused.cuda_plans import cuda_device

Call = Callable[[], Sequence[Any]]
Layout = Literal["NCHW", "channels_last"]
# How the bytes of an operation are counted: see Operation, and on CUDA also by the launches planned for the shape.
Traffic = Literal["resident", "streaming", "planned"]

# (channels, height and width) of every batch norm in ResNet-50.
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 28), (512, 28)),
    *((256, 14), (1024, 14), (512, 7), (2048, 7)),
)
QUICK = ((64, 56), (512, 28), (2048, 7))
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS: tuple[Layout, ...] = ("NCHW", "channels_last")
MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
BATCHES = {"cpu": (32,), "cuda": (256, 32)}
SMALL = (8, 64, 8, 8)
# Shapes of a rehearsal: small, one with an even and one with an odd number of positions.
TINY = ((2, 8, 6, 6), (2, 5, 7, 7))

COMPILER = "inductor"  # the backend of torch.compile; a rehearsal uses "eager", which compiles nothing

# Allowed error of normfused, relative to the largest value: some ulps of float32, half to one ulp of 16-bit formats.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# A larger relative error means a wrong result, for any peer. torch itself has errors up to 7e-5 in float32 with
# channels_last, and separate layers round their intermediate results.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


BASIC = ("normfused", "torch", "copy", "clone")  # measured on every device


@dataclass(frozen=True)
class Operation:
    """An operation, and how often it reads and writes a whole tensor: (reads, writes)."""

    title: str
    resident: tuple[int, int]  # the tensor stays on chip between the statistics and their application
    streaming: tuple[int, int]  # it does not


OPERATIONS = {
    "training_forward": Operation("BN training, forward", (1, 1), (2, 1)),
    "training_backward": Operation("BN training, backward", (2, 1), (4, 1)),
    "training_forward_backward": Operation("BN training, forward + backward", (3, 2), (6, 2)),
    "relu_forward_backward": Operation("BN + ReLU training, forward + backward", (3, 2), (6, 2)),
    "add_relu_forward_backward": Operation("BN + add + ReLU training, forward + backward", (4, 3), (7, 3)),
    "eval_forward": Operation("BN eval, forward", (1, 1), (1, 1)),
    "channel_moments": Operation("channel_moments", (1, 0), (1, 0)),
    "channel_sums": Operation("channel_sums", (1, 0), (1, 0)),
    "small_call": Operation("Small call, BN forward + backward", (3, 2), (6, 2)),
}
GRID_OPERATIONS = tuple(name for name in OPERATIONS if name != "small_call")


@dataclass(frozen=True)
class Case:
    operation: str
    shape: tuple[int, ...]  # (N, C, ...)
    dtype: torch.dtype
    layout: Layout

    @property
    def name(self) -> str:
        return "-".join((self.operation, "x".join(map(str, self.shape)), dtype_name(self.dtype), self.layout))

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def traffic_bytes(case: Case, traffic: Traffic) -> int:
    """Minimum number of bytes that the operation moves. Per-channel vectors are not counted."""
    if traffic == "planned":
        return _planned_bytes(case)
    reads, writes = getattr(OPERATIONS[case.operation], traffic)
    return (reads + writes) * case.tensor_bytes  # type: ignore[no-any-return]


def _planned_bytes(case: Case) -> int:
    """Bytes that the CUDA launches planned for the case read and write, partial results included."""
    extension = normfused._extension.C
    assert extension is not None
    operations = {
        "training_forward": ["TRAINING"],
        "training_backward": ["BACKWARD"],
        "eval_forward": ["INFERENCE"],
        "channel_moments": ["MOMENTS"],
        "channel_sums": ["SUMS"],
    }.get(case.operation, ["TRAINING", "BACKWARD"])  # an activation adds no traffic; a residual does, below
    n, c, *sides = case.shape
    inner = math.prod(sides)
    view = (n * inner, c, 1) if case.layout == "channels_last" else (n, c, inner)
    is_fused = "relu" in case.operation
    device = cuda_device("cuda:0")
    plans = [
        extension.cuda_traffic(getattr(extension.Operation, name), view, case.dtype.itemsize, is_fused, *device[1:])
        for name in operations
    ]
    # The forward pass reads the residual once, and the backward pass writes its gradient once.
    residual = 2 * case.tensor_bytes if case.operation.startswith("add") else 0
    return residual + sum(plan["read"] + plan["written"] for plan in plans)


def grid(device: str, *, quick: bool = False, tiny: bool = False) -> list[Case]:
    """All cases of a device, ordered so that cases with the same input are adjacent.

    With `quick`: three of the nine shapes. With `tiny`: the shapes of a rehearsal.
    """
    shapes = [(n, c, side, side) for n in BATCHES[device] for c, side in (QUICK if quick else RESNET50)]
    shapes = list(TINY) if tiny else shapes
    layouts = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    cases = [Case(op, shape, *rest) for shape in shapes for rest in layouts for op in GRID_OPERATIONS]
    return cases + [Case("small_call", SMALL, *rest) for rest in layouts]


@functools.lru_cache(maxsize=1)
def _inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(mean: float, std: float) -> Tensor:
        values = torch.empty(shape, device=device).normal_(mean, std, generator=generator)
        return values.to(dtype, memory_format=MEMORY_FORMATS[layout])

    x = normal(5, 2)
    return x, normal(0, 1), x.clone()


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """An input, a gradient of the output, and a buffer to copy into. The memory of the buffer is already mapped."""
    return _inputs(case.shape, case.dtype, case.layout, device)


def inputs_read(case: Case) -> list[Tensor]:
    """The tensors that the operation reads on the CPU."""
    x, grad_output, _ = inputs(case, "cpu")
    return [x, grad_output] if "backward" in case.operation else [x]


def build_calls(case: Case, device: str, peers: Iterable[str] = BASIC) -> dict[str, Call]:
    """One call per peer. Each allocates its outputs, except `copy`, which writes to an existing buffer."""
    x, grad_output, buffer = inputs(case, device)
    stock = _layer(nn, x)
    make: dict[str, Callable[[], Call]] = {
        "normfused": lambda: _call(case.operation, _layer(normfused, x), OUR_STATISTICS, x, grad_output),
        "torch": lambda: _call(case.operation, stock, STATISTICS, x, grad_output),
        "native": lambda: _without_cudnn(case.operation, x, grad_output),
        "compile": lambda: _compiled(case.operation, stock, x, grad_output),
        "copy": lambda: lambda: (buffer.copy_(x),),
        "clone": lambda: lambda: (x.clone(),),
    }
    return {peer: make[peer]() for peer in peers}


def mkldnn_call(case: Case) -> tuple[Call, Tensor]:
    """A forward pass of torch.nn on a tensor in torch's oneDNN layout, and a dense view of that tensor's memory."""
    x, grad_output, _ = inputs(case, "cpu")
    opaque = x.to_mkldnn()
    address, size = torch.ops.mkldnn.data_ptr(opaque), torch.ops.mkldnn._nbytes(opaque)
    memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=x.dtype)
    return _call(case.operation, _layer(nn, x), STATISTICS, opaque, grad_output), memory


def _layer(module: Any, x: Tensor) -> Callable[[int], nn.Module]:
    """The batch norm class of `module` for inputs of x's number of dimensions."""
    return module.BatchNorm2d if x.dim() == 4 else module.BatchNorm1d  # type: ignore[no-any-return]


def _compiled(operation: str, stock: Callable[[int], nn.Module], x: Tensor, grad_output: Tensor) -> Call:
    torch.compiler.reset()  # each case is compiled for its own shape
    compile_ = functools.partial(torch.compile, dynamic=False, backend=COMPILER)
    statistics = {name: compile_(function) for name, function in STATISTICS.items()}
    return _call(operation, lambda channels: compile_(stock(channels)), statistics, x, grad_output)


def _without_cudnn(operation: str, x: Tensor, grad_output: Tensor) -> Call:
    off = torch.backends.cudnn.flags
    with off(enabled=False):  # here too: a backward pass uses the implementation that its forward pass chose
        call = _call(operation, _layer(nn, x), STATISTICS, x, grad_output)

    def without() -> Sequence[Any]:
        with off(enabled=False):
            return call()

    return without


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    return x.sum(dims), x.square().sum(dims)


Statistics = Mapping[str, Callable[[Tensor], Sequence[Any]]]
OUR_STATISTICS: Statistics = {"channel_moments": normfused.channel_moments, "channel_sums": normfused.channel_sums}
STATISTICS: Statistics = {"channel_moments": _var_mean, "channel_sums": _sums}


def _call(
    operation: str,
    layer: Callable[[int], Any],
    statistics: Statistics,
    x: Tensor,
    grad_output: Tensor,
    relu: Callable[[Tensor], Tensor] = torch.relu,
) -> Call:
    """The call that computes `operation` on `x`.

    `layer` makes a batch norm from a number of channels. `statistics` holds the functions that are operations
    themselves.
    """
    if operation in statistics:
        return lambda: statistics[operation](x)

    norm = trained_norm(x, layer)
    if "relu" in operation:
        return _block(operation, norm, x, grad_output, relu)
    if operation == "eval_forward":
        norm.eval()
        return torch.no_grad()(lambda: (norm(x),))

    leaf = x.detach().requires_grad_()
    inputs = (leaf, *norm.parameters())
    if operation == "training_forward":
        return lambda: (norm(leaf),)
    if operation == "training_backward":
        output = norm(leaf)
        return lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True)

    def forward_backward() -> Sequence[Tensor]:
        output = norm(leaf)
        return output, *torch.autograd.grad(output, inputs, grad_output)

    return forward_backward


def _block(operation: str, norm: nn.Module, x: Tensor, grad_output: Tensor, relu: Callable[[Tensor], Tensor]) -> Call:
    """Batch norm, an optional addition, and ReLU: fused if `norm` is normfused's, separate layers otherwise."""
    leaf = x.detach().requires_grad_()
    residuals = [grad_output.detach().requires_grad_()] if operation.startswith("add") else []
    if isinstance(norm, normfused.BatchNorm2d):
        state = norm.state_dict()
        norm = normfused.BatchNormAct2d(norm.num_features, "relu", device=x.device, dtype=norm.weight.dtype)
        norm.load_state_dict(state)
        block: Callable[..., Tensor] = norm
    else:
        block = lambda x, *residual: relu(sum(residual, start=norm(x)))  # noqa: E731
    inputs = (leaf, *norm.parameters(), *residuals)

    def forward_backward() -> Sequence[Tensor]:
        output = block(leaf, *residuals)
        return output, *torch.autograd.grad(output, inputs, grad_output)

    return forward_backward


@torch.no_grad()
def trained_norm(x: Tensor, layer: Callable[[int], Any] = nn.BatchNorm2d) -> Any:
    """A batch norm for x with parameters and statistics typical of a trained layer, the same for every peer."""
    norm = layer(x.size(1)).to(x.device, torch.promote_types(x.dtype, torch.float32))
    generator = torch.Generator().manual_seed(1)
    ranges = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5), "running_mean": (4.5, 5.5), "running_var": (3.0, 5.0)}
    for name, tensor in norm.state_dict().items():
        kind = name.rpartition(".")[2]  # compiled modules prefix the names
        if kind in ranges:
            tensor.copy_(torch.empty(tensor.shape).uniform_(*ranges[kind], generator=generator))
    return norm


class Oracle:
    """torch's results in float64, the reference for every peer."""

    def __init__(self, case: Case, device: str) -> None:
        self._case = case
        self._x, self._grad_output, _ = inputs(case, device)
        self._expected: Sequence[Tensor] | None = None

    def error(self, peer: str, results: Sequence[Any]) -> float:
        """The maximum error over a peer's results, relative to each result's largest value. NaN if any is NaN."""
        if peer in ("copy", "clone"):
            return _error(results[0], self._x)
        if peer == "normfused" and self._case.operation == "channel_moments":
            count, mean, m2, *_ = results
            results = (m2 / count, mean)
        if peer == "normfused" and self._case.operation == "channel_sums":
            _, *results, _, _ = results
        errors = [_error(*pair) for pair in zip(results, self._exact(results[0]), strict=True)]
        return max(errors, key=lambda error: (math.isnan(error), error))

    def _exact(self, output: Tensor) -> Sequence[Tensor]:
        if "relu" in self._case.operation:
            # Rounding decides which elements near zero are positive. Use the peer's signs in the reference too.
            positive = output.detach() > 0
            return self._compute(lambda z: z * positive)
        if self._expected is None:
            self._expected = self._compute(torch.relu)
        return self._expected

    def _compute(self, relu: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        x, grad_output = self._x.double(), self._grad_output
        grad_output = grad_output.double() if "backward" in self._case.operation else grad_output
        return _call(self._case.operation, _layer(nn, x), STATISTICS, x, grad_output, relu)()


def _error(actual: Tensor, exact: Tensor) -> float:
    """The maximum error, relative to the largest exact value."""
    if actual.shape != exact.shape:
        return math.inf
    # In chunks: the temporaries in float64 are several times as large as the tensor.
    chunks = zip(actual.detach().split(32), exact.detach().split(32), strict=True)
    maxima = torch.stack([torch.stack([(a - e).abs().max(), e.abs().max()]) for a, e in chunks])
    error, largest = maxima.amax(0).tolist()
    return error / largest if largest else math.nan
