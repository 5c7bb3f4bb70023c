"""Batch norm on several CUDA streams, threads and devices at once, and in graphs that are replayed many times.

The shapes are reduced by several blocks per channel. A counter in memory tells the last of them that it is the last.
Concurrent launches must not share a counter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfused
from normfused import functional

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)

SHAPES = [(32, 3, 65, 33), (16, 64, 56, 56)]
FORMATS = [torch.contiguous_format, torch.channels_last]
variants = pytest.mark.parametrize(
    ("shape", "memory_format"),
    [(shape, memory_format) for shape in SHAPES for memory_format in FORMATS],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value).partition(".")[2],
)


def step(layer: nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], grad_output)]


def make(
    shape: tuple[int, ...], memory_format: torch.memory_format, seed: int, device: torch.device | str
) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, grad_output = (
        torch.randn(shape, generator=generator).contiguous(memory_format=memory_format).to(device) for _ in range(2)
    )
    return normfused.BatchNorm2d(shape[1]).to(device), x.requires_grad_(), grad_output


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {index} differs, at most by {(a - b).abs().max():.3g}"


@variants
def test_two_streams_at_once(device: torch.device, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    calls = [make(shape, memory_format, seed, device) for seed in range(2)]
    expected = [step(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[list[Tensor]]] = [[], []]
    for _ in range(25):
        for stream, call, mine in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                mine.append(step(*call))
    torch.cuda.synchronize()
    for mine, want in zip(results, expected, strict=True):
        for got in mine:
            assert_equal(got, want)


def test_streams_that_are_destroyed_and_created(device: torch.device) -> None:
    """The next stream may have the handle of a destroyed one."""
    layer, x, grad_output = make(SHAPES[0], torch.contiguous_format, 0, device)
    expected = step(layer, x, grad_output)
    for _ in range(40):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = step(layer, x, grad_output)
        stream.synchronize()
        assert_equal(got, expected)
        del stream


@variants
def test_a_graph_replayed_100_times_with_changed_input(
    device: torch.device, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """Outputs, gradients and running statistics of each replay are those of an eager step."""
    layer, x, grad_output = make(shape, memory_format, 0, device)
    eager = normfused.BatchNorm2d(shape[1]).to(device)
    graph, captured = capture(lambda: step(layer, x, grad_output))
    eager.load_state_dict(layer.state_dict())
    for _ in range(100):
        with torch.no_grad():
            x.normal_(1, 2)
            grad_output.normal_()
        graph.replay()
        assert_equal(captured, step(eager, x, grad_output))
        assert_equal(list(layer.buffers()), list(eager.buffers()))


def capture(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, call()


def test_two_graphs_at_once(device: torch.device) -> None:
    """Captured from the same stream, replayed on two."""
    calls = [make(SHAPES[1], torch.channels_last, seed, device) for seed in range(2)]
    expected = [step(*call) for call in calls]
    graphs = [capture(lambda call=call: step(*call)) for call in calls]  # type: ignore[misc]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, got), want in zip(graphs, expected, strict=True):
        assert_equal(got, want)


def test_a_first_call_can_be_captured(device: torch.device) -> None:
    """Initialization that a process does once also works during a capture. Runs in a new process."""
    code = """
import torch, normfused
x = torch.randn(32, 3, 65, 33, device="cuda")
layer = normfused.BatchNorm2d(3).cuda()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = layer(x)
graph.replay()
torch.cuda.synchronize()
torch.testing.assert_close(y, torch.nn.BatchNorm2d(3).cuda()(x), rtol=1e-4, atol=1e-4)
"""
    run_alone(code)


def test_stream_of_each_thread(device: torch.device) -> None:
    """cudaStreamPerThread is one handle, which stands for a different stream in each thread.

    Runs without the caching allocator, which regards the handle as one stream and would reuse memory across threads.
    """
    code = """
import threading, torch, normfused
per_thread = 2  # cudaStreamPerThread
shape = (32, 3, 65, 33)
inputs = [torch.randn(shape, device="cuda") + i for i in range(2)]
layers = [normfused.BatchNorm2d(3).cuda() for _ in inputs]
with torch.no_grad():
    expected = [layer(x) for layer, x in zip(layers, inputs)]
torch.cuda.synchronize()
results = [[], []]
begin = threading.Barrier(2)

def run(i):
    stream = torch.cuda.ExternalStream(per_thread)
    with torch.no_grad(), torch.cuda.stream(stream):
        begin.wait()
        for _ in range(200):
            results[i].append(layers[i](inputs[i]))
        stream.synchronize()

threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
torch.cuda.synchronize()
for want, got in zip(expected, results):
    assert len(got) == 200
    for y in got:
        assert torch.equal(y, want)
"""
    if not hasattr(torch.cuda, "ExternalStream"):
        pytest.skip("this torch has no ExternalStream")
    run_alone(code, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_alone(code: str, **settings: str) -> None:
    environment = {**os.environ, **settings, "NORMFUSED_STRICT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=os.sep
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_threads_with_separate_streams(device: torch.device) -> None:
    """Forward and backward run in two threads, each on its own stream."""
    import threading

    calls = [make(SHAPES[0], torch.contiguous_format, seed, device) for seed in range(2)]
    expected = [step(*call) for call in calls]
    torch.cuda.synchronize()
    results: list[list[list[Tensor]]] = [[], []]
    begin = threading.Barrier(2)

    def run(index: int) -> None:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            begin.wait()
            results[index] += [step(*calls[index]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, want in zip(results, expected, strict=True):
        assert len(mine) == 50
        for got in mine:
            assert_equal(got, want)


@variants
def test_a_device_that_is_not_the_current_one(
    device: torch.device, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device("cuda", 1)
    call, call_there = (make(shape, memory_format, 0, where) for where in (device, other))
    expected = [*step(*call), *functional.channel_moments(call[1].detach())[1:]]
    for stream in (torch.cuda.default_stream(other), torch.cuda.Stream(other)):
        torch.cuda.synchronize(other)
        torch.cuda.set_stream(stream)  # this makes its device the current one
        torch.cuda.set_device(0)
        got = [*step(*call_there), *functional.channel_moments(call_there[1].detach())[1:]]
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(other)
        assert all(tensor.device == other for tensor in got)
        assert_equal([t.cpu() for t in got], [t.cpu() for t in expected])
    torch.cuda.set_stream(torch.cuda.default_stream(other))
    torch.cuda.set_device(0)
