"""Fake kernels and decompositions of the operators, for compilers and exporters.

A fake kernel returns uninitialized results with the shapes, dtypes and strides of the operator's. Its parameters are
those of the operator's schema. A decomposition computes an evaluation operator by torch's own operators, for exporters
of formats that support no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfused import _torch_private, decompositions
from normfused.arguments import check_parameter
from normfused.layout import as_dense

_Function = Callable[..., Any]


def _output_like(input: Tensor) -> Tensor:
    return torch.empty_like(as_dense(input))


def _check_device(input: Tensor, *others: Tensor | None) -> None:
    """Raise for mixed devices: if any argument is a meta tensor, torch calls fake kernels with real tensors too."""
    for other in others:
        if other is not None and other.device != input.device:
            raise ValueError(f"input is on {input.device}, another argument on {other.device}")


def _check_like_input(input: Tensor, **tensors: Tensor | None) -> None:
    """Raise, as the kernels do, for another shape or dtype than ``input``'s."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if (tensor.shape, tensor.dtype) != (input.shape, input.dtype):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {got}, input {input.dtype} of shape {tuple(input.shape)}")


def _check_parameters(input: Tensor, shape: Sequence[int], by_sample: bool = False, **tensors: Tensor | None) -> None:
    """Raise, as the kernels do, for another shape or dtype. ``by_sample``: there may be parameters of each sample."""
    for name, tensor in tensors.items():
        is_by_sample = by_sample and tensor is not None and tensor.dim() == len(shape) + 1
        check_parameter("normfused", name, tensor, input, (input.size(0), *shape) if is_by_sample else tuple(shape))


def _statistics(input: Tensor) -> Tensor:
    return input.new_empty((2, input.size(1)), dtype=torch.float64)


def _mask(input: Tensor, save_mask: bool) -> Tensor:
    return input.new_empty(((input.numel() + 7) // 8 + 8 if save_mask else 0,), dtype=torch.uint8)


def _fake_of_decomposed(name: str) -> Callable[[_Function], _Function]:
    """``torch.library.register_fake`` for an operator with a decomposition that compilers must not use.

    Fake tensors prefer a decomposition to a fake kernel, unless torch's "meta" table has an entry. Inductor would
    replace the operator with its decomposition.
    """
    operator = getattr(torch.ops.normfused, name).default

    def register(shapes: _Function) -> _Function:
        @torch.library.register_fake(f"normfused::{name}")
        @functools.wraps(shapes)
        def fake(*args: Any, **kwargs: Any) -> Any:
            _torch_private.call_from_inductor(operator)
            return shapes(*args, **kwargs)

        return _torch_private.register_decomposition(operator, "meta")(shapes)

    return register


@torch.library.register_fake("normfused::batch_norm_training")
def _batch_norm_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    save_mask: bool = False,
    correction: int = 1,
    nonfinite_batches: Tensor | None = None,
    update_in_backward: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(input, weight, bias, running_mean, running_var, num_batches_tracked, residual, nonfinite_batches)
    _check_parameters(
        input, (input.size(1),), weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _check_like_input(input, residual=residual)
    return _output_like(input), _statistics(input), _mask(input, save_mask)


@_fake_of_decomposed("batch_norm_inference")
def _batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(input, weight, bias, running_mean, running_var, residual)
    _check_parameters(
        input, (input.size(1),), weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _check_like_input(input, residual=residual)
    return _output_like(input), _statistics(input), _mask(input, save_mask)


@torch.library.register_fake("normfused::batch_norm_training_")
def _batch_norm_training_inplace(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str = "identity",
    activation_param: float = 0.0,
    correction: int = 1,
    nonfinite_batches: Tensor | None = None,
    update_in_backward: bool = True,
) -> Tensor:
    _check_device(input, weight, bias, running_mean, running_var, num_batches_tracked, nonfinite_batches)
    _check_parameters(
        input, (input.size(1),), weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    return _statistics(input)


@torch.library.register_fake("normfused::batch_norm_inference_")
def _batch_norm_inference_inplace(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> Tensor:
    _check_device(input, weight, bias, running_mean, running_var)
    _check_parameters(
        input, (input.size(1),), weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    return _statistics(input)


@torch.library.register_fake("normfused::batch_norm_backward")
def _batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    training: bool,
    output_mask: list[bool],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    from_output: bool = False,
    sums: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_device(input, grad_output, weight, statistics, bias, residual, mask, sums, count)
    _check_parameters(input, (input.size(1),), weight=weight, bias=bias)
    _check_like_input(input, grad_output=grad_output, residual=None if mask is not None else residual)
    if weight is not None:
        dtype = weight.dtype
    else:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    grad_input, grad_residual = (
        _output_like(input) if requested else input.new_empty((0,)) for requested in (output_mask[0], output_mask[3])
    )
    grad_weight, grad_bias = (
        input.new_empty((input.size(1) if requested else 0,), dtype=dtype) for requested in output_mask[1:3]
    )
    return grad_input, grad_weight, grad_bias, grad_residual


@torch.library.register_fake("normfused::batch_norm_by_statistics")
def _batch_norm_by_statistics(
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_device(input, statistics, weight, bias, residual)
    _check_parameters(input, (input.size(1),), weight=weight, bias=bias)
    _check_like_input(input, residual=residual)
    return _output_like(input), _mask(input, save_mask)


@_fake_of_decomposed("group_norm")
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(input, weight, bias, residual)
    _check_parameters(input, (input.size(1),), by_sample=True, weight=weight, bias=bias)
    _check_like_input(input, residual=residual)
    if num_groups < 1 or input.size(1) % num_groups != 0:
        raise ValueError(f"num_groups must divide the {input.size(1)} channels of input, got {num_groups}")
    statistics = input.new_empty((2, input.size(0), num_groups), dtype=torch.float64)
    return _output_like(input), statistics, _mask(input, save_mask)


@torch.library.register_fake("normfused::group_norm_backward")
def _group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    statistics: Tensor,
    output_mask: list[bool],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_device(input, grad_output, weight, statistics, bias, residual, mask)
    _check_parameters(input, (input.size(1),), by_sample=True, weight=weight, bias=bias)
    _check_like_input(input, grad_output=grad_output, residual=None if mask is not None else residual)
    grad_input, grad_residual = (
        _output_like(input) if requested else input.new_empty((0,)) for requested in (output_mask[0], output_mask[3])
    )
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32

    def gradient(like: Tensor | None, requested: bool) -> Tensor:
        shape = (0,) if not requested else (input.size(1),) if like is None else like.shape
        return input.new_empty(shape, dtype=wide if like is None else like.dtype)

    of_bias = weight if bias is None else bias
    return grad_input, gradient(weight, output_mask[1]), gradient(of_bias, output_mask[2]), grad_residual


@_fake_of_decomposed("layer_norm")
def _layer_norm(
    input: Tensor,
    start_dim: int,
    end_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    subtract_mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(input, weight, bias, residual)
    _check_parameters(input, input.shape[start_dim : end_dim + 1], by_sample=True, weight=weight, bias=bias)
    _check_like_input(input, residual=residual)
    shape = [1 if start_dim <= dim <= end_dim else size for dim, size in enumerate(input.shape)]
    output = _layer_norm_output(input, start_dim, end_dim)
    added = input.new_empty((0,)) if residual is None else torch.empty_like(output)
    return output, added, input.new_empty((2, *shape), dtype=torch.float64)


def _layer_norm_output(input: Tensor, start_dim: int, end_dim: int) -> Tensor:
    by_channel = start_dim == end_dim == 1
    return _output_like(input) if by_channel else input.new_empty(input.shape)


@torch.library.register_fake("normfused::layer_norm_backward")
def _layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    start_dim: int,
    end_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    output_mask: list[bool],
    grad_sum: Tensor | None = None,
    subtract_mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(input, grad_output, weight, bias, statistics, grad_sum)
    _check_parameters(input, input.shape[start_dim : end_dim + 1], by_sample=True, weight=weight, bias=bias)
    _check_like_input(input, grad_output=grad_output, grad_sum=grad_sum)
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32

    def gradient(like: Tensor | None, requested: bool) -> Tensor:
        shape = (0,) if not requested else input.shape[start_dim : end_dim + 1] if like is None else like.shape
        return input.new_empty(shape, dtype=wide if like is None else like.dtype)

    grad_input = _layer_norm_output(input, start_dim, end_dim) if output_mask[0] else input.new_empty((0,))
    of_bias = weight if bias is None else bias
    return grad_input, gradient(weight, output_mask[1]), gradient(of_bias, output_mask[2])


@torch.library.register_fake("normfused::pack_moments")
def _pack_moments(input: Tensor, eps: float) -> Tensor:
    words = 1 + (2 if input.dtype == torch.float64 else 1) * input.size(1)
    return input.new_empty((words,), dtype=torch.int64)


@torch.library.register_fake("normfused::merge_ranks")
def _merge_ranks(
    words: Tensor,
    channels: int,
    own_count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int = 1,
    nonfinite_batches: Tensor | None = None,
    update_in_backward: bool = True,
) -> tuple[Tensor, Tensor]:
    _check_device(words, running_mean, running_var, num_batches_tracked, nonfinite_batches)
    return words.new_empty((2, channels), dtype=torch.float64), words.new_empty(())


@_fake_of_decomposed("local_response_norm")
def _local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _output_like(input)


@torch.library.register_fake("normfused::local_response_norm_backward")
def _local_response_norm_backward(
    grad_output: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    _check_device(input, grad_output)
    return _output_like(input)


@torch.library.register_fake("normfused::channel_moments")
def _channel_moments(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, m2, low, high = (input.new_empty((input.size(1),), dtype=torch.float64) for _ in range(4))
    return mean, m2, low, high


@torch.library.register_fake("normfused::channel_sums")
def _channel_sums(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if input.is_floating_point() else torch.int64
    total, squares, low, high = (input.new_empty((input.size(1),), dtype=dtype) for _ in range(4))
    return total, squares, low, high


@torch.library.register_fake("normfused::integer_sums")
def _integer_sums(input: Tensor) -> Tensor:
    return input.new_empty((8, input.size(1)), dtype=torch.int64)


@_fake_of_decomposed("standardize")
def _standardize(
    input: Tensor,
    mean: list[float],
    std: list[float],
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    if input.dim() == 3:
        one: Tensor = _standardize(input.unsqueeze(0), mean, std, scale, dtype, memory_format)
        return one.squeeze(0)
    if memory_format in (None, torch.preserve_format):
        memory_format = _torch_private.suggest_memory_format(as_dense(input))
    dtype = dtype or (torch.float32 if input.dtype == torch.uint8 else input.dtype)
    return torch.empty_like(input, dtype=dtype, memory_format=memory_format)


@torch.library.register_fake("normfused::standardize_out")
def _standardize_out(input: Tensor, mean: list[float], std: list[float], scale: float, out: Tensor) -> None:
    _check_device(input, out)


@torch.library.register_fake("normfused::standardize_")
def _standardize_inplace(input: Tensor, mean: list[float], std: list[float], scale: float = 1.0) -> None:
    pass


# ---- decompositions --------------------------------------------------------------------------------------------------


def _decompose(name: str) -> Callable[[_Function], _Function]:
    """Register a decomposition into torch's operators in the table that exporters such as torch.onnx use.

    Compilers do not use it: see :func:`_fake_of_decomposed`.
    """
    return _torch_private.register_decomposition(getattr(torch.ops.normfused, name).default, "post_autograd")


@_decompose("batch_norm_inference")
def _decomposed_batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if save_mask:  # only batch_norm_backward reads a mask
        return NotImplemented  # type: ignore[no-any-return]
    arguments = (weight, bias, running_mean, running_var, eps, residual, activation, activation_param)
    output = decompositions.batch_norm_inference(input, *arguments)
    statistics = torch.stack((running_mean.double(), (running_var.double() + eps).rsqrt()))
    return output, statistics, _mask(input, save_mask)


@_decompose("group_norm")
def _decomposed_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if save_mask:  # only group_norm_backward reads a mask
        return NotImplemented  # type: ignore[no-any-return]
    arguments = (num_groups, weight, bias, eps, residual, activation, activation_param)
    output = decompositions.group_norm(input, *arguments)
    groups = input.double().reshape(input.size(0), num_groups, -1)
    mean, var = groups.mean(-1), groups.var(-1, correction=0)
    return output, torch.stack((mean, (var + eps).rsqrt())), _mask(input, save_mask)


@_decompose("layer_norm")
def _decomposed_layer_norm(
    input: Tensor,
    start_dim: int,
    end_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    subtract_mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (input, start_dim, end_dim, weight, bias, eps, residual, subtract_mean)
    output, total = decompositions.layer_norm(*arguments)
    x, dims = total.double(), list(range(start_dim, end_dim + 1))
    mean = x.mean(dims, keepdim=True)
    mean = mean if subtract_mean else torch.zeros_like(mean)
    invstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    return output, input.new_empty((0,)) if residual is None else total, torch.stack((mean, invstd))


@_decompose("local_response_norm")
def _decomposed_local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return decompositions.local_response_norm(input, size, alpha, beta, k)


@_decompose("standardize")
def _decomposed_standardize(
    input: Tensor,
    mean: list[float],
    std: list[float],
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    return decompositions.standardize(input, mean, std, scale, dtype, memory_format)
