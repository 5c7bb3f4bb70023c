"""Tests that need a CUDA device: graphs, streams, synchronization, determinism."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import normfused
from normfused import explain, functional

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)

# The last are held by clusters of blocks, where the device has them.
SHAPES = [(8, 64, 8, 8), (32, 3, 65, 33), (16, 256, 28, 28), (64, 512, 7, 7), (32, 64, 56, 56), (32, 64, 112, 112)]
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def step(layer: torch.nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    output = layer(x)
    return [output, *torch.autograd.grad(output, [x, *layer.parameters()], grad_output)]


def variant_id(variant: tuple[tuple[int, ...], torch.dtype, torch.memory_format]) -> str:
    shape, dtype, memory_format = variant
    return "-".join(("x".join(map(str, shape)), str(dtype).partition(".")[2], str(memory_format).partition(".")[2]))


@pytest.fixture(params=[(s, d, f) for s in SHAPES for d in DTYPES for f in FORMATS], ids=variant_id)
def inputs(request: pytest.FixtureRequest, device: torch.device) -> tuple[normfused.BatchNorm2d, Tensor, Tensor]:
    shape, dtype, memory_format = request.param
    x = torch.randn(shape, device=device).to(dtype, memory_format=memory_format).requires_grad_()
    return normfused.BatchNorm2d(shape[1]).to(device), x, torch.randn_like(x)


def test_every_run_is_bitwise_identical(inputs: tuple[normfused.BatchNorm2d, Tensor, Tensor]) -> None:
    """Also while other work runs on the device."""
    layer, *tensors = inputs
    first = step(layer, *tensors)
    other = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    for _ in range(10):
        with torch.cuda.stream(other):
            noise = noise @ noise.T / 2048
        again = step(layer, *tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other.synchronize()


def test_graph_replays_equal_eager_steps(inputs: tuple[normfused.BatchNorm2d, Tensor, Tensor]) -> None:
    layer, x, grad_output = inputs
    eager = normfused.BatchNorm2d(x.size(1)).to(x.device)
    eager.load_state_dict(layer.state_dict())
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(layer, x, grad_output)
    torch.cuda.current_stream().wait_stream(warm_up)
    layer.load_state_dict(eager.state_dict())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, grad_output)
    for _ in range(3):
        with torch.no_grad():
            x.normal_(1, 2)
        graph.replay()
        expected = step(eager, x, grad_output)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, eager.get_buffer(name)), name
    assert layer.num_batches_tracked == 3


def test_graph_replays_during_eager_work(device: torch.device) -> None:
    """A graph has its own tickets, so later work on the stream of its capture does not disturb it."""
    x = torch.randn(32, 64, 56, 56, device=device)
    layer = normfused.BatchNorm2d(64).to(device)
    expected = layer(x)
    capture, replay = torch.cuda.Stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture):
        captured = layer(x)
    for _ in range(20):
        with torch.cuda.stream(replay):
            graph.replay()
        with torch.cuda.stream(capture):
            eager = layer(x)
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert torch.equal(eager, expected)


def test_no_call_synchronizes_with_the_device(inputs: tuple[normfused.BatchNorm2d, Tensor, Tensor]) -> None:
    layer, x, grad_output = inputs
    cumulative = normfused.BatchNorm2d(x.size(1), momentum=None).to(x.device)
    step(layer, x, grad_output)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, grad_output)
        step(cumulative, x, grad_output)
        step(layer.eval(), x, grad_output)
        normfused.functional.channel_moments(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


HELD = [
    (nn.BatchNorm2d(512), (32, 512, 28, 28)),  # by a block for each channel
    (nn.BatchNorm2d(256), (256, 256, 14, 14)),  # in bfloat16, rows that are not whole vectors
    (nn.BatchNorm2d(128), (32, 128, 56, 56)),  # by a cluster
    (nn.BatchNorm2d(64), (32, 64, 112, 112)),
    (nn.GroupNorm(32, 320), (2, 320, 64, 64)),
    (nn.GroupNorm(32, 640), (2, 640, 48, 48)),  # in backward by a cluster
    (nn.InstanceNorm2d(64, affine=True), (4, 64, 160, 160)),
    (nn.LayerNorm(50_000), (16, 50_000)),
]


@pytest.mark.parametrize(("original", "shape"), HELD, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_a_launch_holds(
    device: torch.device, original: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Output and gradients compared with torch in float64, with values far from zero."""
    torch.manual_seed(0)
    exact = copy.deepcopy(original).double().to(device)
    ours = normfused.convert(copy.deepcopy(original)).to(device)
    x = (torch.randn(shape, device=device) + 3).to(dtype)
    grad_output = torch.randn(shape, device=device).to(dtype)
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert explain(ours, x).passes[0].path == "held in shared memory"
    expected = step(exact, x.double().requires_grad_(), grad_output.double())
    got = step(ours, x.requires_grad_(), grad_output)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * e.abs().max().item())


@pytest.mark.parametrize(("original", "shape"), HELD, ids=lambda value: str(value).replace(" ", ""))
def test_explained_launches_take_place(device: torch.device, original: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = normfused.convert(copy.deepcopy(original)).to(device), torch.randn(shape, device=device)
    layer(x)
    for _ in range(3):  # a profiler that has just started can miss short kernels
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            layer(x)
            torch.cuda.synchronize()
        kernels = [e.name for e in profiler.events() if "normfused" in e.name and e.device_type == DeviceType.CUDA]
        if kernels:
            break
    assert len(kernels) == explain(layer, x).passes[0].launches, kernels


def test_runs_on_the_current_stream(device: torch.device) -> None:
    x = torch.full((64, 64, 56, 56), 1.0, device=device)
    layer = normfused.BatchNorm2d(64, affine=False).to(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.fill_(3)  # delayed: a launch on another stream would still read 1
        layer(x)
    stream.synchronize()
    assert torch.allclose(layer.running_mean, torch.full_like(layer.running_mean, 0.3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_integer_sums_are_exact(device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    values = torch.randint(0, 120, (50, 3, 64, 65)).to(dtype).contiguous(memory_format=memory_format)
    count, total, squares, low, high = functional.channel_sums(values.to(device))
    wide = values.long()
    assert count == 50 * 64 * 65
    assert torch.equal(total.cpu(), wide.sum((0, 2, 3)))
    assert torch.equal(squares.cpu(), (wide * wide).sum((0, 2, 3)))
    assert torch.equal(low.cpu(), wide.amin((0, 2, 3)))
    assert torch.equal(high.cpu(), wide.amax((0, 2, 3)))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_images_are_standardized_from_and_to_either_layout(
    device: torch.device, memory_format: torch.memory_format
) -> None:
    images = torch.randint(0, 256, (2, 3, 31, 44), dtype=torch.uint8)
    want = functional.normalize(images, 0.5, 0.25)
    for wide in (images, images.float() / 255):
        for into in FORMATS:
            x = wide.to(device).contiguous(memory_format=memory_format)
            got = functional.normalize(x, 0.5, 0.25, memory_format=into)
            torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_local_response_norm_both_ways(device: torch.device, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 40, 9, 11, dtype=torch.float64).contiguous(memory_format=memory_format)
    results = []
    for where, norm in ((device, functional.local_response_norm), ("cpu", F.local_response_norm)):
        leaf = x.detach().to(where).requires_grad_()
        y = norm(leaf, 5, 0.1)
        results.append([y.detach().cpu(), torch.autograd.grad(y.square().sum(), leaf)[0].cpu()])
    torch.testing.assert_close(*results)


def test_mixed_devices_are_refused(device: torch.device) -> None:
    layer = normfused.BatchNorm2d(4)
    with pytest.raises(ValueError, match=r"weight is on cpu, but input is on cuda:0"):
        layer(torch.randn(2, 4, 3, 3, device=device))
    with pytest.raises(ValueError, match=r"weight is on cuda:0, but input is on cpu"):
        layer.to(device)(torch.randn(2, 4, 3, 3))


def test_device_need_not_be_the_current_one(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = torch.randn(8, 64, 28, 28, device="cuda:1")
    layer = normfused.BatchNorm2d(64).to("cuda:1")
    reference = torch.nn.BatchNorm2d(64).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.allclose(layer(x), reference(x), atol=1e-5)


def test_memory_is_released(device: torch.device) -> None:
    x = torch.randn(32, 64, 56, 56, device=device, requires_grad=True)
    layer = normfused.BatchNorm2d(64).to(device)
    step(layer, x, x.detach())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step(layer, x, x.detach())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
