"""All norms, per-channel statistics and standardization as functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from normfused import _extension, decompositions, reference
from normfused._torch_private import is_functionalized, is_transformed
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS
from normfused.arguments import (
    BatchNormCall,
    BatchNormFields,
    check_activation,
    check_arguments,
    check_inplace,
    check_local_response_norm,
    check_shape,
    check_statistics_input,
)
from normfused.checks import DTYPES, INTEGERS, needs_torchs_operators
from normfused.data.normalization import normalize, normalize_
from normfused.distributed import dtensor
from normfused.layer_norms import layer_norm, layer_norm2d, rms_norm, rms_norm2d
from normfused.layout import values_per_channel
from normfused.masks import check_mask, masked_rows, masked_zeros, some_positions_of, unmasked
from normfused.residuals import split_residual
from normfused.results import ChannelMoments, ChannelSums
from normfused.sample_norms import group_norm, instance_norm

__all__ = [
    "ChannelMoments",
    "ChannelSums",
    "batch_norm",
    "channel_moments",
    "channel_sums",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layer_norm2d",
    "local_response_norm",
    "normalize",
    "normalize_",
    "rms_norm",
    "rms_norm2d",
]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    mask: Tensor | None = None,
    running_var_correction: int = 1,
    nonfinite_batches: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Normalize each channel of ``input`` over all other dimensions; optionally add a residual and apply an activation.

    ``activation((input - mean) / sqrt(var + eps) * weight + bias + residual)``. In training, mean and biased variance
    are those of the batch; otherwise they are the running statistics. A drop-in for
    :func:`torch.nn.functional.batch_norm`.

    Args:
        input: shape ``(N, C, ...)``, float32, float64, float16 or bfloat16, any strides. Overwritten if ``inplace``.
        running_mean, running_var: shape ``(C,)``, given together or not at all; required unless ``training``. Training
            updates them in place: ``(1 - momentum) * running + momentum * batch``. It does so also when checkpointing
            recomputes this call; only the layers can tell that. Never saved for backward.
        weight, bias: shape ``(C,)``; default 1 and 0. Parameters and running statistics have ``input``'s dtype, or
            float32 if ``input`` is float16 or bfloat16. All arithmetic is in float32 or wider.
        training: whether the statistics of the batch are used. Default False.
        momentum: weight of the batch in the running statistics; default 0.1. ``None``: cumulative average, which
            requires ``num_batches_tracked``.
        eps: added to the variance; finite and not negative; default 1e-5.
        num_batches_tracked: 0-d int64 tensor; training increments it in place.
        residual: added before the activation; ``input``'s shape and device. A different dtype, one of the four, is
            promoted as in ``batch_norm(input) + residual``. If the promoted dtype is not ``input``'s, as for a float32
            residual of a float16 input, torch's operators add and activate in separate passes.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``,
            ``"silu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, or ``"identity"``, the default.
        activation_param: leaky ReLU's negative slope (default 0.01), ELU's alpha (default 1).
        mask: bool, shape ``(N, ...)``, ``input``'s shape without the channels: True at the valid positions. The result
            is that of the valid positions alone; all others are zero and have zero gradients. Training requires a
            valid position. A training forward waits once for the device, to count the positions; backward and
            evaluation do not wait. Compiled code requires two valid positions and raises ``RuntimeError`` at run time;
            without ``fullgraph``, torch may split the graph here, because the number of positions depends on data.
        running_var_correction: 1, the default, updates ``running_var`` with the unbiased variance, as torch does; 0
            with the biased variance, so that ``momentum=1`` makes evaluation equal training.
        nonfinite_batches: shape ``(C,)``, int64. If given, a channel whose batch contains an infinity or NaN does not
            update its running statistics, and its counter here is incremented in place.
        inplace: overwrite ``input`` with the output and return it. Backward uses the output, and nothing else of
            ``input``'s size is saved. Requires an invertible activation, ``"identity"`` or ``"leaky_relu"`` with a
            positive parameter, and neither ``residual`` nor ``mask``. Backward recovers the input from the rounded
            output: in float16 and bfloat16, gradients differ by about the output's rounding error. Channels whose
            weight is too small for this (``abs(bias) > 8 * abs(weight)``, or a weight near the smallest normal number)
            save their input. Finding them makes forward wait once for the device if backward needs the input: in
            training, or if ``weight`` requires grad. Compiled code runs out of place, since compilers plan memory
            themselves.

    Returns:
        A tensor of ``input``'s shape, memory format and dtype (but see ``residual``). Differentiable any number of
        times, in reverse and forward mode and under :mod:`torch.func`; running statistics are not differentiable.
        Saved for backward: ``input``; or one bit per element for ReLU and leaky ReLU of a sum with a residual; and the
        residual for other activations. An empty batch returns an empty output and updates nothing.

    Raises:
        ValueError: an invalid shape, device, name or number, or one value per channel in training.
        TypeError: an unsupported dtype.
        RuntimeError: a CUDA tensor if the extension was built without CUDA; with ``inplace``, an input that cannot be
            overwritten: a leaf that requires grad, overlapping memory, or a tensor that autograd has saved.
        NotImplementedError: :func:`torch.func.vmap` over ``input`` in training, but not over the running statistics.

    If ``input`` is a ``DTensor``, all tensors must be DTensors on its mesh (``num_batches_tracked`` may be plain), and
    ``mask`` and ``inplace`` are not supported. If the running statistics are sharded, or without them if the input's
    channels are, each rank computes its own channels. Otherwise training gathers the batch, as torch's own batch norm
    does, and evaluation leaves it sharded.

    Example:
        >>> input = torch.arange(8.0).view(2, 2, 2)
        >>> running_mean, running_var = torch.zeros(2), torch.ones(2)
        >>> batch_norm(input, running_mean, running_var, training=True, momentum=1.0, activation="relu")
        tensor([[[0.0000, 0.0000],
                 [0.0000, 0.0000]],
        <BLANKLINE>
                [[0.7276, 1.2127],
                 [0.7276, 1.2127]]])
        >>> running_mean
        tensor([2.5000, 4.5000])

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html; in place: Rota Bulò, Porzi and
    Kontschieder, 2018, arXiv:1712.02616
    """
    activation = "identity" if activation is None else activation
    if activation_param is None:
        activation_param = ACTIVATION_PARAMS.get(activation, 0.0)
    return run_batch_norm((
        "batch_norm", None, input, running_mean, running_var, weight, bias, training, momentum, eps,
        num_batches_tracked, residual, activation, activation_param, mask, running_var_correction,
        nonfinite_batches, inplace, True,
    ))  # fmt: skip


def run_batch_norm(fields: BatchNormFields) -> Tensor:
    """:func:`batch_norm` for functions and layers, with the fields of a :class:`BatchNormCall`.

    ``fields`` may be a plain tuple: the named one takes 0.3 us to build, and the fast path does not need it.
    The kernels check their arguments tersely. Only after they raise, :func:`check_arguments` raises the full message.
    """
    (name, input_dims, input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked,
     residual, activation, activation_param, mask, correction, nonfinite_batches, inplace, update) = fields  # fmt: skip
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(run_batch_norm_of, tensors, *fields)
    if type(input) is not Tensor and dtensor.is_dtensor(input):
        return dtensor.batch_norm(run_batch_norm, BatchNormCall._make(fields))
    check_shape(name, input_dims, input, training and mask is None, running_mean is not None)
    compiling = torch.compiler.is_compiling()
    traced = not training and needs_torchs_operators(compiling)
    if inplace:
        call = BatchNormCall._make(fields)
        check_inplace(call)
        if compiling or traced or _extension.C is None or is_transformed():
            # Autograd may save tensors that torch's operators read: they must not be overwritten.
            return input.copy_(run_batch_norm(call._replace(input=input.clone(), inplace=False)))
    if mask is not None:
        return _run_masked(BatchNormCall._make(fields), mask)
    if residual is not None and getattr(residual, "dtype", None) != input.dtype:
        return _run_mixed(BatchNormCall._make(fields), residual)
    if compiling or traced or _extension.C is None:
        return _run_by_torch(BatchNormCall._make(fields), compiling, traced)
    kernels = _extension.C
    try:
        if inplace and training:
            kernels.batch_norm_training_(
                input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                activation, activation_param, correction, nonfinite_batches, update,
            )  # fmt: skip
            return input
        if inplace:
            kernels.batch_norm_inference_(
                input, weight, bias, running_mean, running_var, eps, activation, activation_param
            )
            return input
        if training:
            return kernels.batch_norm_training(  # type: ignore[no-any-return]
                input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                residual, activation, activation_param, False, correction, nonfinite_batches, update,
            )  # fmt: skip
        return kernels.batch_norm_inference(  # type: ignore[no-any-return]
            input, weight, bias, running_mean, running_var, eps, residual, activation, activation_param, False
        )
    except (RuntimeError, TypeError, ValueError) as error:
        refusal = error
    call = BatchNormCall._make(fields)
    check_arguments(call)
    if not is_functionalized():  # functionalization rejects operators that update buffers
        raise refusal
    return run_by_reference(call)


def run_batch_norm_of(*fields: Any) -> Tensor:
    """:func:`run_batch_norm` for ``__torch_function__``, whose overrides often do not look for tensors in tuples."""
    return run_batch_norm(fields)


def _run_masked(call: BatchNormCall, mask: Tensor) -> Tensor:
    """The call for the valid positions only."""
    name, input = call.name, call.input
    check_mask(name, mask, input)
    call = call._replace(input_dims=None, mask=None)
    if not call.training:  # which needs no statistics: all positions are normalized, the invalid ones as zeros
        part, residual = masked_zeros(mask, input, call.residual)
        return masked_zeros(mask, run_batch_norm(call._replace(input=part, residual=residual)), None)[0]
    positions = some_positions_of(name, mask, input)
    part, residual = masked_rows(positions, input, call.residual)
    if torch.compiler.is_compiling():  # some_positions_of() checks it at run time; this tells the symbolic shapes
        torch._check(part.numel() != part.size(1))  # type: ignore[no-untyped-call]
    return unmasked(positions, run_batch_norm(call._replace(input=part, residual=residual)), input)


def _run_mixed(call: BatchNormCall, residual: Tensor) -> Tensor:
    """The call with a residual of another dtype, which is converted, or added afterwards in the promoted dtype."""
    converted, wide = split_residual(call.input, residual)
    call = call._replace(residual=converted)
    if wide is None:
        return run_batch_norm(call)
    check_activation("batch_norm", call.activation, call.activation_param)
    output = run_batch_norm(call._replace(activation="identity", activation_param=0.0))
    return ACTIVATIONS[call.activation](output + wide, call.activation_param)


def _run_by_torch(call: BatchNormCall, compiling: bool, traced: bool) -> Tensor:
    """The call in operators that a compiler or tracer sees, or without the extension."""
    with _no_tracer_warnings() if traced else nullcontext():
        check_arguments(call)
    input, weight, bias, mean, var = call.input, call.weight, call.bias, call.running_mean, call.running_var
    after: dict[str, Any] = {
        "residual": call.residual,
        "activation": call.activation,
        "activation_param": call.activation_param,
    }
    if traced:
        assert mean is not None
        assert var is not None
        return decompositions.batch_norm_inference(input, weight, bias, mean, var, call.eps, **after)
    if not compiling or _extension.C is None:
        return run_by_reference(call)
    # torch.ops, because compilers cannot see into functions of pybind11.
    if call.training:
        results = torch.ops.normfused.batch_norm_training(
            *(input, weight, bias, mean, var, call.num_batches_tracked, call.momentum, call.eps),
            **after,
            correction=call.running_var_correction,
            nonfinite_batches=call.nonfinite_batches,
            update_in_backward=call.update_in_backward,
        )
    else:
        results = torch.ops.normfused.batch_norm_inference(input, weight, bias, mean, var, call.eps, **after)
    return results[0]  # type: ignore[no-any-return]


def run_by_reference(call: BatchNormCall, all_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The call in plain torch. ``all_sum`` adds sums over ranks: see :func:`normfused.reference.batch_norm`."""
    return reference.batch_norm(
        *(call.input, call.running_mean, call.running_var, call.weight, call.bias),
        *(call.training, call.momentum, call.eps),
        num_batches_tracked=call.num_batches_tracked,
        residual=call.residual,
        activation=call.activation,
        activation_param=call.activation_param,
        running_var_correction=call.running_var_correction,
        nonfinite_batches=call.nonfinite_batches,
        update_in_backward=call.update_in_backward,
        all_sum=all_sum,
    )


@contextmanager
def _no_tracer_warnings() -> Iterator[None]:
    """Without the warnings of ``torch.jit.trace`` about comparisons of sizes, which checks make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def channel_sums(input: Tensor) -> ChannelSums:
    """Count, sum, sum of squares, minimum and maximum of each channel, in one read of ``input``.

    Args:
        input: shape ``(N, C, ...)``, any strides, floating-point or integer. Floating-point dtypes are summed in
            float64, integers exactly in int64.

    Returns:
        ``count`` (int, elements per channel), and ``sum``, ``sum_of_squares``, ``min`` and ``max``: shape ``(C,)``,
        float64 or int64. NaN for a channel that contains NaN. For empty channels 0, 0, and infinities or int64's
        limits. Not differentiable. For the variance of floating-point data use :func:`channel_moments`, which does not
        suffer from cancellation. On CUDA, int32 and int64 wait for the device.

    Raises:
        ValueError: fewer than two dimensions; integers whose sum or sum of squares exceeds int64
            (:class:`ChannelStats` has no such limit).
        TypeError: bool or complex input.

    Example:
        >>> sums = channel_sums(torch.tensor([[[1, 2, 3]], [[4, 5, 6]]], dtype=torch.uint8))
        >>> sums.count, sums.sum, sums.sum_of_squares
        (6, tensor([21]), tensor([91]))

    Source: :func:`torch.sum`, :func:`torch.aminmax`.
    """
    check_statistics_input("channel_sums", input, DTYPES + INTEGERS)
    input = input.detach()
    if dtensor.is_dtensor(input):
        return dtensor.channel_statistics(channel_sums, input)  # type: ignore[no-any-return]
    if _extension.C is None:
        return reference.channel_sums(input)
    operators = torch.ops.normfused if torch.compiler.is_compiling() else _extension.C
    return ChannelSums(values_per_channel(input), *operators.channel_sums(input))


def channel_moments(input: Tensor) -> ChannelMoments:
    """Count, mean, sum of squared deviations, minimum and maximum of each channel, in one read of ``input``.

    Args:
        input: shape ``(N, C, ...)``, float32, float64, float16 or bfloat16, any strides.

    Returns:
        ``count`` (int, elements per channel), and ``mean``, ``m2``, ``min`` and ``max``: shape ``(C,)``, float64.
        ``m2`` is the sum of squared deviations from the mean, so ``m2 / count`` is the biased variance. Deviations of
        any magnitude count; only of float64 input, below 1e-154 and above 1e154, the squares underflow or overflow.
        NaN for a channel that contains NaN. For empty channels 0, 0, inf, -inf. Not differentiable.

    Raises:
        ValueError: fewer than two dimensions.
        TypeError: input that is not floating-point.

    Example:
        >>> moments = channel_moments(torch.tensor([[[1.0, 2.0, 3.0, 6.0]]]))
        >>> moments.mean, moments.m2 / moments.count
        (tensor([3.], dtype=torch.float64), tensor([3.5000], dtype=torch.float64))

    Source: Chan, Golub and LeVeque, 1983, "Algorithms for Computing the Sample Variance".
    """
    check_statistics_input("channel_moments", input, DTYPES)
    input = input.detach()
    if dtensor.is_dtensor(input):
        return dtensor.channel_statistics(channel_moments, input)  # type: ignore[no-any-return]
    if _extension.C is None:
        return reference.channel_moments(input)
    operators = torch.ops.normfused if torch.compiler.is_compiling() else _extension.C
    return ChannelMoments(values_per_channel(input), *operators.channel_moments(input))


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Divide each element by a power of the sum of squares over ``size`` neighboring channels.

    ``input / (k + alpha / size * sum(input[:, c - size // 2 : c + (size - 1) // 2 + 1] ** 2)) ** beta`` for channel
    ``c``, with zeros outside of the channels. A drop-in for :func:`torch.nn.functional.local_response_norm`.

    Args:
        input: shape ``(N, C, ...)`` with at least 3 dimensions, float32, float64, float16 or bfloat16, any strides.
            Arithmetic is in float32, or in float64 for float64 input.
        size: number of channels in the window, at least 1. An even window has one channel more to the left.
        alpha, beta, k: numbers, as in the formula.

    Returns:
        A new tensor of ``input``'s shape, dtype and memory format. Differentiable any number of times; only ``input``
        is saved for backward. An empty input returns an empty output.

    Raises:
        ValueError: fewer than three dimensions, or a size below 1.
        TypeError: an unsupported dtype, or an argument that is not a number.
        RuntimeError: a CUDA tensor if the extension was built without CUDA.

    Example:
        >>> local_response_norm(torch.ones(1, 3, 1), size=2, alpha=2.0, beta=1.0)
        tensor([[[0.5000],
                 [0.3333],
                 [0.3333]]])

    Source: Krizhevsky, Sutskever and Hinton, 2012, "ImageNet Classification with Deep Convolutional Neural Networks";
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.local_response_norm.html
    """
    if has_torch_function_unary(input):
        return handle_torch_function(local_response_norm, (input,), input, size, alpha=alpha, beta=beta, k=k)
    compiling = torch.compiler.is_compiling()
    if needs_torchs_operators(compiling):
        check_local_response_norm(input, size, alpha, beta, k)
        return decompositions.local_response_norm(input, size, alpha, beta, k)
    refusal = None
    if _extension.C is not None and not compiling:
        try:
            return _extension.C.local_response_norm(input, size, alpha, beta, k)  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, ValueError) as error:
            refusal = error  # check_local_response_norm() raises the full message
    check_local_response_norm(input, size, alpha, beta, k)
    if dtensor.is_dtensor(input):
        return dtensor.local_response_norm(local_response_norm, input, size, alpha, beta, k)
    if refusal is not None:
        raise refusal
    if compiling:
        output: Tensor = torch.ops.normfused.local_response_norm(input, size, alpha, beta, k)
        return output
    return reference.local_response_norm(input, size, alpha, beta, k)
