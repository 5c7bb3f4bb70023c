"""Errors of the outputs, gradients and statistics of every operation, in ulp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from ulp_activations import FLOATS, Figures
from ulp_exact import Exact, Norm, errors, local_response_norm, to_wide

import normfused
from normfused import functional

OPERATORS = torch.ops.normfused
# Mean / standard deviation of the inputs with a large mean: 16-bit formats still resolve the standard deviation.
LARGE_MEAN = {torch.float16: 100.0, torch.bfloat16: 10.0}  # else 1000
EPS = 1e-5
Results = dict[str, Tensor]


class Case(NamedTuple):
    """Inputs, and their calls. The arrays of `norm` have the shape `view`, its parameters the shape `parameters`."""

    shape: tuple[int, ...]
    view: tuple[int, ...]
    parameters: tuple[int, ...]
    norm: Norm
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    has_large_mean: bool = False
    has_buffers: bool = False
    memory_format: torch.memory_format = torch.contiguous_format


def _activated(function: Callable[..., Tensor], activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: activation(function(*arguments))


def _batch(module: Any, x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor, **options: Any) -> Tensor:
    return module.batch_norm(x, *(running or (None, None)), weight, bias, training=not running, eps=EPS, **options)  # type: ignore[no-any-return]


def _group(module: Any, groups: int, x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return module.group_norm(x, groups, weight, bias, EPS, **options)  # type: ignore[no-any-return]


def _instance(module: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return module.instance_norm(x, weight=weight, bias=bias, eps=EPS)  # type: ignore[no-any-return]


def _layer(module: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return module.layer_norm(x, x.shape[-1:], weight, bias, EPS)  # type: ignore[no-any-return]


def _rms(module: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return module.rms_norm(x, x.shape[-1:], weight, EPS)  # type: ignore[no-any-return]


def _both(function: Callable[..., Tensor], *arguments: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The calls of normfused and of torch."""
    return partial(function, functional, *arguments), partial(function, F, *arguments)


def _fused(name: str, function: Callable[..., Tensor], *arguments: Any) -> tuple[Callable[..., Tensor], ...]:
    ours, theirs = _both(function, *arguments)
    return partial(ours, activation=name), _activated(theirs, getattr(F, name))


IMAGES, LARGE, ROWS = (16, 32, 14, 14), (4, 3, 128, 128), (128, 768)
OF_CHANNELS, OF_GROUPS, OF_ROWS = Norm((0, 2), EPS), Norm((2, 3), EPS), Norm((1,), EPS)
_channels = ((16, 32, 196), (1, 32, 1))
_groups = ((16, 8, 4, 196), (1, 8, 4, 1))
_instances = ((16, 32, 1, 196), (1, 32, 1, 1))
CASES = {
    "batch norm": Case(IMAGES, *_channels, OF_CHANNELS, *_both(_batch)),
    "batch norm, large mean": Case(IMAGES, *_channels, OF_CHANNELS, *_both(_batch), has_large_mean=True),
    "batch norm, channels last": Case(
        IMAGES, *_channels, OF_CHANNELS, *_both(_batch), memory_format=torch.channels_last
    ),
    "batch norm, 65536 values": Case(LARGE, (4, 3, 16384), (1, 3, 1), OF_CHANNELS, *_both(_batch)),
    "batch norm, evaluation": Case(IMAGES, *_channels, OF_CHANNELS, *_both(_batch), has_buffers=True),
    "batch norm + ReLU": Case(IMAGES, *_channels, OF_CHANNELS._replace(activation="relu"), *_fused("relu", _batch)),
    "batch norm + SiLU": Case(IMAGES, *_channels, OF_CHANNELS._replace(activation="silu"), *_fused("silu", _batch)),
    "group norm": Case(IMAGES, *_groups, OF_GROUPS, *_both(_group, 8)),
    "group norm, large mean": Case(IMAGES, *_groups, OF_GROUPS, *_both(_group, 8), has_large_mean=True),
    "group norm + SiLU": Case(IMAGES, *_groups, OF_GROUPS._replace(activation="silu"), *_fused("silu", _group, 8)),
    "instance norm": Case(IMAGES, *_instances, OF_GROUPS, *_both(_instance)),
    "layer norm": Case(ROWS, ROWS, (1, 768), OF_ROWS, *_both(_layer)),
    "layer norm, large mean": Case(ROWS, ROWS, (1, 768), OF_ROWS, *_both(_layer), has_large_mean=True),
    "RMS norm": Case(ROWS, ROWS, (1, 768), OF_ROWS._replace(subtracts_mean=False), *_both(_rms)),
}


def _normal(generator: np.random.Generator, shape: Sequence[int], mean: float = 0.0) -> Tensor:
    """The same values on every machine, which torch's generator does not promise."""
    return torch.from_numpy(generator.standard_normal(shape) + mean)


def _signed(generator: np.random.Generator, count: int) -> Tensor:
    """Values of magnitude 0.5 to 1.5: no term vanishes."""
    return torch.from_numpy(generator.uniform(0.5, 1.5, count) * generator.choice([-1.0, 1.0], count))


def _norm(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Exact]]:
    """Each result: its name, the tensors of normfused and of torch, and the exact values."""
    generator = np.random.default_rng(0)
    mean = LARGE_MEAN.get(dtype, 1000.0) if case.has_large_mean else 0.5
    x = _normal(generator, case.shape, mean).to(dtype, memory_format=case.memory_format)
    grad = _normal(generator, case.shape).to(dtype, memory_format=case.memory_format)
    count = int(np.prod(case.parameters))
    weight, bias = (_signed(generator, count).to(dtype) for _ in range(2))
    if not case.norm.subtracts_mean:
        bias.zero_()
    running = [x.new_full((count,), 0.4), x.new_full((count,), 1.1)] if case.has_buffers else []
    arrays = (to_wide(t).reshape(case.view) for t in (x, grad))
    vectors = (to_wide(t).reshape(case.parameters) for t in (weight, bias, *running))
    x_wide, grad_wide, weight_wide, bias_wide, *running_wide = (*arrays, *vectors)
    exact = case.norm.results(x_wide, grad_wide, weight_wide, bias_wide, running_wide)
    ours, theirs = (_run(f, x, grad, weight, bias, running) for f in (case.ours, case.torchs))
    for name, want in exact.items():
        if name in ours:
            yield name, ours[name], theirs[name], want


def _run(
    function: Callable[..., Tensor], x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, running: Sequence[Tensor]
) -> Results:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, *running)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    named = zip(("output", "grad_input", "grad_weight", "grad_bias"), (y.detach(), *grads), strict=True)
    return {name: value for name, value in named if value is not None}


def _statistics(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Exact]]:
    """Mean, variance and invstd, which are those of batch norm, group norm and layer norm too."""
    for label, mean in (("", 0.5), (", large mean", LARGE_MEAN.get(dtype, 1000.0))):
        x = _normal(np.random.default_rng(0), IMAGES, mean).to(dtype)
        wide = x.to(torch.promote_types(dtype, torch.float32))  # torch rounds statistics to the dtype of the input
        exact = OF_CHANNELS.statistics(to_wide(x).reshape(_channels[0]))
        moments = normfused.channel_moments(x)
        invstd = OPERATORS.batch_norm_training(x, None, None, None, None, None, 0.1, EPS)[1][1]
        variance, own_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        theirs = torch.native_batch_norm(wide, None, None, None, None, True, 0.0, EPS)[2]
        yield f"mean{label}", moments.mean, own_mean, exact["mean"]
        yield f"variance{label}", moments.m2 / moments.count, variance, exact["variance"]
        yield f"invstd{label}", invstd, theirs, exact["invstd"]


def _normalize(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Exact]]:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = torch.from_numpy(np.random.default_rng(0).random((4, 3, 64, 64)))
    x = image.to(dtype)
    size = (np.array(values, np.longdouble).reshape(3, 1, 1) for values in (mean, std))
    m, s = size
    theirs = (x - torch.tensor(mean, dtype=dtype).view(3, 1, 1)) / torch.tensor(std, dtype=dtype).view(3, 1, 1)
    wide = to_wide(x)
    yield "output", normfused.normalize(x, mean, std), theirs, Exact((wide - m) / s, (abs(wide) + m) / s)
    if dtype != torch.float32:
        return
    pixels = (image * 255).round().to(torch.uint8)
    theirs = (pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    wide = pixels.numpy().astype(np.longdouble) / 255
    yield "output, uint8", normfused.normalize(pixels, mean, std), theirs, Exact((wide - m) / s, (abs(wide) + m) / s)


def _response(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Exact]]:
    generator = np.random.default_rng(0)
    x, grad = (_normal(generator, IMAGES, 0.5).to(dtype) for _ in range(2))
    exact = local_response_norm(to_wide(x), to_wide(grad), size=5, alpha=0.5, beta=0.75, k=1.0)
    wide = torch.promote_types(dtype, torch.float32)  # torch has no kernel for 16-bit formats on the CPU
    calls = (
        lambda x: functional.local_response_norm(x, 5, 0.5, 0.75, 1.0),
        lambda x: F.local_response_norm(x.to(wide), 5, 0.5, 0.75, 1.0).to(dtype),
    )
    results = []
    for call in calls:
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        results.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    yield from zip(("output", "grad_input"), *results, exact, strict=True)


def _all(dtype: torch.dtype) -> Iterator[tuple[str, tuple[str, Tensor, Tensor, Exact]]]:
    for name, case in CASES.items():
        yield from ((name, result) for result in _norm(case, dtype))
    yield from (("channel statistics", result) for result in _statistics(dtype))
    yield from (("normalize", result) for result in _normalize(dtype))
    yield from (("local response norm", result) for result in _response(dtype))


def measure() -> dict[str, Figures]:
    """For normfused and torch the maximum errors."""
    results: dict[str, Figures] = {"normfused": {}, "torch": {}}
    for dtype in FLOATS:
        for case, (name, *tensors, exact) in _all(dtype):
            for who, got in zip(results, tensors, strict=True):
                # Statistics are in ulp of float32 for 16-bit input, and where torch's are float32.
                at = torch.promote_types(dtype, torch.float32) if case == "channel statistics" else dtype
                for measure, error in errors(got.reshape(exact.value.shape), exact, at)._asdict().items():
                    results[who][f"{str(dtype)[6:]}, {case}, {name}, {measure}"] = error.max().item()
    return results
