"""Compiled, under autocast and in five dimensions on CUDA: several training steps equal those of eager layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import normfused

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)

MODES = ["default", "reduce-overhead"]
# One block per channel, and several, the last of which merges.
SHAPES = [(8, 64, 8, 8), (32, 16, 56, 56)]
STEPS = 6  # mode="reduce-overhead" runs the first, records the second, and replays the others


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(
    model: nn.Module, function: Callable[[Tensor], Tensor], inputs: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """Outputs and gradients of each step, and the state after the last one."""
    results = []
    for values, grad_output in zip(inputs, grads, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        x = values.clone().requires_grad_()
        y = function(x)
        y.backward(grad_output)
        # Copies, because a replay overwrites the results of the previous one.
        results += [y.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
        for parameter in model.parameters():
            parameter.grad = None
    return results + [value.clone() for value in model.state_dict().values()]


def make_inputs(shape: tuple[int, ...], device: torch.device, memory_format: torch.memory_format) -> list[list[Tensor]]:
    return [
        [torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(STEPS)]
        for _ in range(2)
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_compiled_training_is_eager_training(
    device: torch.device, mode: str, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    eager = normfused.BatchNormAct2d(shape[1], "relu").to(device)
    model = copy.deepcopy(eager)
    inputs, grads = make_inputs(shape, device, memory_format)
    expected = train(eager, eager, inputs, grads)
    got = train(model, torch.compile(model, mode=mode, fullgraph=True, dynamic=False), inputs, grads)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {index} differs, at most by {(a.double() - b.double()).abs().max():.3g}"


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_network_trains_like_torchs(device: torch.device, mode: str) -> None:
    """Batch norm between other layers, which compilers fuse, and twice in one graph."""

    def network(layers: object) -> nn.Module:
        norm: Callable[[int], nn.Module] = layers.BatchNorm2d  # type: ignore[attr-defined]
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, bias=False), norm(16), nn.ReLU()),
            *(nn.Conv2d(16, 8, 3), norm(8), nn.SiLU(), nn.AvgPool2d(4)),
        ).to(device, torch.float64)

    stock, model = network(nn), network(normfused)
    inputs = [torch.randn(16, 3, 24, 24, device=device, dtype=torch.float64) for _ in range(STEPS)]
    grads = [torch.randn(16, 8, 5, 5, device=device, dtype=torch.float64) for _ in range(STEPS)]
    expected = train(stock, stock, inputs, grads)
    got = train(model, torch.compile(model, mode=mode, fullgraph=True, dynamic=False), inputs, grads)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_evaluation(device: torch.device, mode: str) -> None:
    layer = normfused.BatchNorm2d(16).to(device)
    layer(torch.randn(8, 16, 9, 9, device=device))
    layer.eval()
    compiled = torch.compile(layer, mode=mode, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(STEPS):
            x = torch.randn(8, 16, 28, 28, device=device)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
    """The output of a convolution under autocast is normalized in its dtype, with float32 parameters, as by torch."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()).to(device)
    model = normfused.convert(copy.deepcopy(stock), fuse=False)
    assert isinstance(model[1], normfused.BatchNorm2d)
    results = []
    for net in (model, stock):
        function = torch.compile(net, fullgraph=True) if compiled and net is model else net
        torch.manual_seed(1)
        x = torch.randn(8, 3, 30, 30, device=device, requires_grad=True)
        with torch.autocast(device.type, dtype):
            y = function(x)
        (1000 * y.float().square().mean()).backward()  # scaled, so that the gradients do not underflow in float16
        results.append([y, x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 8 * torch.finfo(dtype).eps
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_3d(device: torch.device, dtype: torch.dtype) -> None:
    results = []
    for layers in (normfused, nn):
        torch.manual_seed(0)
        x = torch.randn(4, 24, 5, 9, 11, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        layer = layers.BatchNorm3d(24).to(device)
        x.requires_grad_()
        y = layer(x)
        (y.float() * torch.linspace(-1, 1, 11, device=device)).sum().backward()
        results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert x.grad.is_contiguous(memory_format=torch.channels_last_3d)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = 1e-4 if dtype == torch.float32 or ours.dim() == 1 else 2 * torch.finfo(dtype).eps
        assert (ours - theirs).abs().max() <= allowed * theirs.abs().max() + allowed
