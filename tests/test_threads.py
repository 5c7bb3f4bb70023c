"""Calls of several threads at the same time give bitwise the results of the same calls in one thread."""

from __future__ import annotations

import copy
import ctypes
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from common import assert_same_bits
from PIL import Image
from scripts import value
from torch import Tensor, nn

import normfused
import normfused.functional as F
from normfused import _extension as extension
from normfused import transforms
from normfused.data import pictures

pytestmark = pytest.mark.usefixtures("needs_extension", "thread_count")

THREADS = 8
# Below and above the sizes from which kernels use several threads, and outputs use the memory pool.
SIZES = {"small": (4, 6, 5, 5), "large": (10, 32, 30, 30)}

Result = TypeVar("Result")
Case = Callable[[Tensor], list[Tensor]]


def at_once(function: Callable[[int], Result], count: int = THREADS) -> list[Result]:
    """The results of ``function(0)``, ``function(1)``, ..., in threads that start together. Raises a thread's error."""
    start = threading.Barrier(count, timeout=60)

    def run(index: int) -> Result:
        start.wait()
        return function(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def trained(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, gradients and buffers after one training step of the layer."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = layer(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    gradients = torch.autograd.grad(y, [*leaves, *layer.parameters()], weights)
    return [y.detach(), *gradients, *layer.buffers()]


def in_place(x: Tensor) -> list[Tensor]:
    layer = normfused.BatchNormAct2d(x.size(1), "leaky_relu", inplace=True)
    leaf = x.clone().requires_grad_()
    y = layer(leaf * 1)
    (gradient,) = torch.autograd.grad(y.sin().sum(), leaf)
    return [y.detach(), gradient, *layer.buffers()]


def statistics(x: Tensor) -> list[Tensor]:
    stats = normfused.ChannelStats(quantiles=[0.1, 0.9]).update(x, "NCHW")
    levels = normfused.ChannelStats().update((x * 40).clamp(-128, 127).to(torch.int8), "NCHW")
    return [stats.mean, stats.std, stats.quantile(), levels.mean, levels.std]


def images(x: Tensor) -> list[Tensor]:
    levels = (x * 40 + 128).clamp(0, 255).to(torch.uint8)[:, :3]
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    return [
        normfused.normalize(levels, mean, std),
        transforms.ToNormalizedTensor(mean, std)(levels[0].permute(1, 2, 0).numpy()),
        transforms.Standardize()(x[0]),
    ]


CASES: dict[str, Case] = {
    "batch norm": lambda x: trained(normfused.BatchNorm2d(x.size(1)), x),
    "evaluation": lambda x: trained(normfused.BatchNorm2d(x.size(1)).eval(), x),
    "channels last": lambda x: trained(
        normfused.BatchNorm2d(x.size(1)), x.contiguous(memory_format=torch.channels_last)
    ),
    "bfloat16": lambda x: trained(normfused.BatchNorm2d(x.size(1)), x.bfloat16()),
    "addition and relu": lambda x: trained(normfused.BatchNormAct2d(x.size(1), "relu"), x, x.flip(0)),
    "in place": in_place,
    "group norm": lambda x: trained(normfused.GroupNormAct(2, x.size(1), "silu"), x),
    "instance norm": lambda x: trained(normfused.InstanceNorm2d(x.size(1), affine=True), x),
    "layer norm": lambda x: trained(normfused.LayerNorm(x.shape[-2:]), x),
    "layer norm of channels": lambda x: trained(normfused.LayerNorm2d(x.size(1)), x),
    "rms norm": lambda x: trained(normfused.RMSNorm(x.size(-1)), x),
    "local response norm": lambda x: trained(normfused.LocalResponseNorm(5), x),
    "moments": lambda x: [torch.as_tensor(field) for field in normfused.channel_moments(x)],
    "sums": lambda x: [torch.as_tensor(field) for field in normfused.channel_sums(x)],
    "channel statistics": statistics,
    "images": images,
}


def inputs(size: str) -> list[Tensor]:
    """Of each thread its own."""
    return [torch.randn(SIZES[size]) * (1 + index) + index for index in range(THREADS)]


def assert_all_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        assert_same_bits(mine, other)


@pytest.mark.parametrize(("size", "threads_of_a_kernel"), [("small", 1), ("small", 5), ("large", 1), ("large", 2)])
def test_calls_of_separate_modules(size: str, threads_of_a_kernel: int) -> None:
    torch.set_num_threads(threads_of_a_kernel)
    data, cases = inputs(size), list(CASES.values())
    expected = [[case(x) for case in cases] for x in data]

    def run(index: int) -> None:
        torch.set_num_threads(threads_of_a_kernel)
        for step in range(len(cases) * (4 if size == "small" else 1)):
            at = (index + step) % len(cases)  # threads that start with different kernels
            assert_all_same(cases[at](data[index]), expected[index][at])

    at_once(run)


def test_the_first_calls_of_a_process() -> None:
    """Imports, the choice of the instruction set and the pool's creation happen once, whoever is first."""
    script = f"""
import threading, torch
torch.set_num_threads(1)
start, results = threading.Barrier({THREADS}), []
x = torch.randn(4, 64, 48, 48, generator=torch.Generator().manual_seed(0))

def step():
    import normfused
    leaf = x.clone().requires_grad_()
    y = normfused.BatchNormAct2d(64, "relu")(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaf), normfused.channel_moments(x).m2]

def run():
    start.wait()
    results.append(step())

threads = [threading.Thread(target=run) for _ in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import normfused
assert normfused.info()["extension"] == "loaded"
expected = step()
print(sum(all(map(torch.equal, result, expected)) for result in results))
"""
    assert value(script) == THREADS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_module_in_evaluation(size: str, deterministic: bool) -> None:
    torch.set_num_threads(2)
    layer, data = normfused.BatchNormAct2d(SIZES[size][1], "relu"), inputs(size)
    layer(data[0])
    layer.eval()
    expected = [trained(layer, x, x.flip(0)) for x in data]

    def run(index: int) -> None:
        for _ in range(10):
            assert_all_same(trained(layer, data[index], data[index].flip(0)), expected[index])

    torch.use_deterministic_algorithms(deterministic)
    try:
        at_once(run)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inplace", [False, True])
def test_one_module_in_training(size: str, inplace: bool) -> None:
    """Outputs and gradients depend on the batch only, and each batch is counted.

    Two updates of the running statistics at the same moment can have the effect of one, as in torch.nn. With equal
    batches the result is therefore that of one update or more, one after the other, in each channel.
    """
    torch.set_num_threads(1 if size == "small" else 2)
    steps = 150 if size == "small" else 3
    x = inputs(size)[0]
    layer = normfused.BatchNormAct2d(x.size(1), "leaky_relu", inplace=inplace)

    def step(of: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = of(leaf * 1)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), [leaf, *of.parameters()])]

    single = copy.deepcopy(layer)
    expected = step(single)
    means, variances = [single.running_mean.clone()], [single.running_var.clone()]
    for _ in range(steps * THREADS - 1):
        step(single)
        means.append(single.running_mean.clone())
        variances.append(single.running_var.clone())

    def run(index: int) -> None:
        for _ in range(steps):
            assert_all_same(step(layer), expected)

    at_once(run)
    assert layer.num_batches_tracked.item() == steps * THREADS
    for sequence, actual in ((means, layer.running_mean), (variances, layer.running_var)):
        assert (torch.stack(sequence) == actual).any(0).all()


def test_gradients_accumulate_from_several_threads() -> None:
    torch.set_num_threads(2)
    layer = normfused.BatchNorm2d(SIZES["large"][1]).eval()
    data = [x.round().requires_grad_() for x in inputs("large")]  # sums of whole numbers are exact
    steps = 30

    def run(index: int) -> None:
        for _ in range(steps):
            layer(data[index]).backward(data[index].detach())

    single = copy.deepcopy(layer)
    at_once(run)
    for x in data:
        single(x).backward(x.detach())
    assert_same_bits(layer.bias.grad, single.bias.grad * steps)
    torch.testing.assert_close(layer.weight.grad, single.weight.grad * steps, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_passes_of_one_graph(inplace: bool) -> None:
    torch.set_num_threads(2)
    x, gradients = inputs("large")[0].requires_grad_(), inputs("large")
    layer = normfused.BatchNormAct2d(x.size(1), "leaky_relu", inplace=inplace)
    y = layer(x * 1)

    def backward(index: int) -> list[Tensor]:
        return list(torch.autograd.grad(y, [x, *layer.parameters()], gradients[index], retain_graph=True))

    expected = [backward(index) for index in range(THREADS)]

    def run(index: int) -> None:
        for _ in range(6):
            assert_all_same(backward(index), expected[index])

    at_once(run)


def test_each_thread_has_its_own_gradient_mode() -> None:
    layer, x = normfused.BatchNorm2d(6).eval(), inputs("small")[0]
    expected = layer(x).detach()
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]

    def run(index: int) -> None:
        for _ in range(100):
            with modes[index % 3]():
                y = layer(x)
            assert (y.is_inference(), y.requires_grad) == (index % 3 == 0, index % 3 == 2)
            assert_same_bits(y.detach(), expected)

    at_once(run)


def test_calls_inside_a_parallel_region() -> None:
    """A team of OpenMP's threads, as in at::parallel_for; the kernels then use the thread that they are called from."""
    lib = ctypes.CDLL(str(extension.C.__file__))  # also finds the symbols of the libraries that it depends on
    if not hasattr(lib, "GOMP_parallel"):
        pytest.skip("needs an extension with GNU's OpenMP")
    data, cases = inputs("large")[:2], list(CASES.values())
    expected = [[case(x) for case in cases] for x in data]
    results: list[list[list[Tensor]] | BaseException] = []

    def body(_: int | None) -> None:
        index = lib.omp_get_thread_num()
        try:
            assert lib.omp_in_parallel()
            results.append([case(data[index]) for case in cases])
            for actual, single in zip(results[-1], expected[index], strict=True):
                assert_all_same(actual, single)
        except BaseException as error:  # which ctypes would print and drop
            results.append(error)

    lib.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body), None, len(data), 0)
    assert not [result for result in results if isinstance(result, BaseException)]
    assert len(results) == len(data)


def test_a_converted_model_is_captured_once_for_all_threads() -> None:
    stem = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*stem, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(THREADS)]
    model = normfused.convert(copy.deepcopy(net))
    results = at_once(lambda index: [model(data[index]) for _ in range(3)])
    for x, outputs in zip(data, results, strict=True):
        expected = model(x)
        torch.testing.assert_close(expected, net(x))
        for y in outputs:
            assert_same_bits(y, expected)
    assert normfused.conversion_report(model).fused


def test_no_stats_update_ends_with_the_last_thread() -> None:
    """Each thread leaves the context before the next one: A enters, B enters, A leaves, B leaves."""
    layer, x = normfused.BatchNorm2d(6), inputs("small")[0]
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with normfused.no_stats_update():
            entered.set()
            assert left.wait(60)
            layer(x)

    with ThreadPoolExecutor(1) as pool:
        with normfused.no_stats_update():
            done = pool.submit(other)
            assert entered.wait(60)
        layer(x)
        assert layer.num_batches_tracked.item() == 0, "the other thread is still in the context"
        left.set()
        done.result()
    assert layer.num_batches_tracked.item() == 0
    layer(x)
    assert layer.num_batches_tracked.item() == 1


def test_several_threads_update_one_channel_stats() -> None:
    levels = torch.randint(256, (THREADS, 20, 3, 4, 4), dtype=torch.uint8)
    expected = normfused.ChannelStats(quantiles=[0.5]).update(levels.flatten(0, 1), "NCHW")
    stats = normfused.ChannelStats(quantiles=[0.5])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds after which Python lets another thread run
    try:
        at_once(lambda index: [stats.update(image) for image in levels[index]])
    finally:
        sys.setswitchinterval(before)
    assert stats == expected


def test_data_sets_that_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "THREAD_BYTES", 0)  # threads of its own decode the files of each
    torch.set_num_threads(2)
    random = np.random.default_rng(0)
    folders = [tmp_path / str(index) for index in range(4)]
    for folder in folders:
        folder.mkdir()
        for index in range(12):
            Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    expected = [normfused.dataset_stats(folder) for folder in folders]

    def run(index: int) -> normfused.ChannelStats:
        torch.set_num_threads(2)
        return normfused.dataset_stats(folders[index])

    assert at_once(run, len(folders)) == expected
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == (filters, limit)
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_torch_operators_run_on_the_pool_of_jit_fork() -> None:
    """``torch.jit.fork`` runs functions on torch's pool of threads between operators."""
    x = inputs("large")[0]
    means = torch.arange(60 * 32.0).view(60, 32)  # of each call its own

    @torch.jit.script
    def outputs(x: Tensor, means: Tensor, var: Tensor) -> list[Tensor]:
        futures = [torch.jit.fork(_normalized, x, mean, var) for mean in means.unbind(0)]
        return [torch.jit.wait(future) for future in futures]

    for y, mean in zip(outputs(x, means, torch.ones(32)), means, strict=True):
        assert_same_bits(y, F.batch_norm(x, mean, torch.ones(32)))


@torch.jit.script
def _normalized(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch.ops.normfused.batch_norm_inference(x, None, None, mean, var, 1e-5)[0]
