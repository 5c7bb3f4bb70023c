"""Batch norm, per-channel statistics, standardization and local response normalization as functions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from normfused import _extension, decompositions, reference
from normfused._torch_private import is_functionalized, is_transformed
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS
from normfused.arguments import (
    check_activation,
    check_arguments,
    check_inplace,
    check_local_response_norm,
    check_shape,
    check_statistics_input,
)
from normfused.checks import DTYPES, needs_torchs_operators
from normfused.data.normalization import normalize, normalize_
from normfused.distributed import dtensor
from normfused.layout import values_per_channel
from normfused.masks import check_mask, masked_rows, masked_zeros, some_positions_of, unmasked
from normfused.residuals import split_residual
from normfused.results import ChannelMoments, ChannelSums

__all__ = [
    "ChannelMoments",
    "ChannelSums",
    "batch_norm",
    "channel_moments",
    "channel_sums",
    "local_response_norm",
    "normalize",
    "normalize_",
]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
    """Normalize each channel of ``input`` over all its other dimensions; then, if wanted, add and activate.

    ``activation((input - mean) / sqrt(var + eps) * weight + bias + residual)``, where mean and (biased) variance are
    the batch's own in training and the running ones otherwise. Drop-in for :func:`torch.nn.functional.batch_norm`.

    Args:
        input: shape ``(N, C, ...)``, float32, float64, float16 or bfloat16, any strides. Written if ``inplace``.
        running_mean, running_var: shape ``(C,)``, given together or not at all; needed unless ``training``. In
            training they are updated in place: ``(1 - momentum) * running + momentum * batch``, also when checkpointing
            runs this call again, which only the layers can tell. Never saved for backward.
        weight, bias: shape ``(C,)``; default 1 and 0. Parameters and buffers have ``input``'s dtype, or float32 where
            that is float16 or bfloat16; all arithmetic is in float32 or wider.
        training: whether the batch's own statistics are used.
        momentum: share of the batch in the running statistics. ``None``: cumulative average, which needs
            ``num_batches_tracked``.
        eps: added to the variance; finite, not negative.
        num_batches_tracked: 0-d int64 tensor, counted up in place in training.
        residual: added before the activation; ``input``'s shape and device. Of another of the four dtypes it is
            promoted as in ``batch_norm(input) + residual``; if the result's dtype is then not ``input``'s, as for a
            float32 residual of a float16 input, addition and activation are separate passes by torch's operators.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``,
            ``"silu"``, ``"gelu"`` (by erf), ``"gelu_tanh"``, or ``"identity"``, the default.
        activation_param: leaky ReLU's negative slope (default 0.01), ELU's alpha (default 1).
        mask: bool, shape ``(N, ...)``, which is ``input``'s without the channels: the positions that are present.
            Results are those of these positions alone; the others give zeros, and have zero gradients. In training at
            least one position must be present. A training forward waits once for the device, to count the positions;
            backward and evaluation do not wait. Compiled code needs two positions, and raises ``RuntimeError`` when it
            runs; without ``fullgraph`` torch may split the graph here, because their number depends on values.
        running_var_correction: 1 updates ``running_var`` with the unbiased variance, as torch does; 0 with the
            variance that normalizes, so that ``momentum=1`` makes evaluation equal training.
        nonfinite_batches: shape ``(C,)``, int64. Where given, a channel whose batch has an infinity or a NaN leaves
            its running statistics as they are, and is counted up here, in place.
        inplace: write the output over ``input`` and return that; backward works from the output, and nothing else is
            kept. For an activation that can be undone, ``"identity"`` or ``"leaky_relu"`` with a positive parameter,
            without ``residual`` and ``mask``. Gradients are those of the input as the rounded output tells it: in
            float16 and bfloat16 off by about the output's rounding. A channel whose weight is too small for that
            (``abs(bias) > 8 * abs(weight)``, or a weight near the least normal number) keeps its input. To find those
            channels, forward waits once for the device where backward needs the input: in training, or if ``weight``
            requires grad. Compiled it is out of place, and compilers plan memory themselves.

    Returns:
        Shape, dtype (see ``residual``) and memory format of ``input``. Derivatives are exact to any order, in reverse
        and forward mode and under :mod:`torch.func`; running statistics have none. Saved for backward: ``input``; one
        bit per element for ReLU and leaky ReLU of a sum; for the other activations of a sum the residual. An empty
        batch gives an empty output and changes no buffer.

    Raises:
        ValueError: a shape, device, name or value that does not fit, or one value per channel in training.
        TypeError: a dtype that is not supported.
        RuntimeError: a CUDA tensor where the extension was built without CUDA; ``inplace`` for an input that cannot
            be overwritten: a leaf that requires grad, overlapping memory, one that its producer keeps for backward.
        NotImplementedError: :func:`torch.func.vmap` over ``input`` in training, but not over the running statistics.

    With a ``DTensor`` as ``input`` all tensors must be DTensors of its mesh (``num_batches_tracked`` may be plain), and
    ``mask`` and ``inplace`` are refused. Where the running statistics are sharded, or without them the input's
    channels, each rank computes its own channels. Otherwise a batch is gathered in training, as by torch's own batch
    norm; in evaluation it stays sharded.

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html; in place: Rota Bulò, Porzi and
    Kontschieder, 2018, arXiv:1712.02616
    """
    activation = "identity" if activation is None else activation
    return named_batch_norm(
        "batch_norm",
        None,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked,
        residual,
        activation,
        ACTIVATION_PARAMS.get(activation, 0.0) if activation_param is None else activation_param,
        mask,
        running_var_correction,
        nonfinite_batches,
        inplace,
    )


def named_batch_norm(
    name: str,
    ranks: tuple[int, ...] | None,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
    mask: Tensor | None = None,
    running_var_correction: int = 1,
    nonfinite_batches: Tensor | None = None,
    inplace: bool = False,
    update_in_backward: bool = True,
) -> Tensor:
    """:func:`batch_norm` for a caller of that name, whose input must have one of these ranks (``None``: any).

    Without ``update_in_backward`` a call inside a backward pass, which is a recomputation, updates no buffer.

    The ranks are looked at here because only here is ``input`` surely a tensor: ``torch.fx`` traces this call whole.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            named_batch_norm,
            tensors,
            name,
            ranks,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            num_batches_tracked,
            residual,
            activation,
            activation_param,
            mask,
            running_var_correction,
            nonfinite_batches,
            inplace,
            update_in_backward,
        )
    if type(input) is not Tensor and dtensor.is_dtensor(input):
        arguments = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, residual)
        after = (activation, activation_param, mask, running_var_correction, nonfinite_batches, inplace)
        return dtensor.batch_norm(named_batch_norm, name, ranks, input, *arguments, *after, update_in_backward)
    check_shape(name, ranks, input, training and mask is None, running_mean is not None)
    compiling = torch.compiler.is_compiling()
    traced = not training and needs_torchs_operators(compiling)
    if inplace:
        check_inplace(name, input, residual, mask, activation, activation_param)
        if compiling or traced or _extension.C is None or is_transformed():
            # Autograd may save what the operators read: nothing must be written over it.
            output = named_batch_norm(
                name,
                ranks,
                input.clone(),
                running_mean,
                running_var,
                weight,
                bias,
                training,
                momentum,
                eps,
                num_batches_tracked,
                None,
                activation,
                activation_param,
                None,
                running_var_correction,
                nonfinite_batches,
                update_in_backward=update_in_backward,
            )
            return input.copy_(output)
    if mask is not None:
        check_mask(name, mask, input)
        positions: tuple[Tensor, ...] = ()
        if training:
            positions = some_positions_of(name, mask, input)
            part, residual_part = masked_rows(positions, input, residual)
        else:  # which needs no statistics: all positions are normalized, those that are left out as zeros
            part, residual_part = masked_zeros(mask, input, residual)
        if training and torch.compiler.is_compiling():  # what some_positions_of() sees to, for symbolic shapes
            torch._check(part.numel() != part.size(1))  # type: ignore[no-untyped-call]
        output = named_batch_norm(
            name,
            None,
            part,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            num_batches_tracked,
            residual_part,
            activation,
            activation_param,
            None,
            running_var_correction,
            nonfinite_batches,
            update_in_backward=update_in_backward,
        )
        return unmasked(positions, output, input) if training else masked_zeros(mask, output, None)[0]
    if residual is not None and getattr(residual, "dtype", None) != input.dtype:
        residual, rest = split_residual(input, residual)
        if rest is not None:
            check_activation("batch_norm", activation, activation_param)
            statistics = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
            updates = (running_var_correction, nonfinite_batches, False, update_in_backward)
            output = named_batch_norm(name, ranks, input, *statistics, None, "identity", 0.0, None, *updates)
            return ACTIVATIONS[activation](output + rest, activation_param)
    refusal = None
    if _extension.C is not None and not compiling and not traced:
        try:
            kernels = _extension.C
            first: tuple[Any, ...] = (input, weight, bias, running_mean, running_var)
            if training:
                first = (*first, num_batches_tracked, momentum)
            last = (running_var_correction, nonfinite_batches, update_in_backward) if training else ()
            if inplace:
                into = kernels.batch_norm_training_ if training else kernels.batch_norm_inference_
                into(*first, eps, activation, activation_param, *last)
                return input
            function = kernels.batch_norm_training if training else kernels.batch_norm_inference
            return function(*first, eps, residual, activation, activation_param, False, *last)  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, ValueError) as error:
            refusal = error  # in few words; the check finds the argument and says what it must be
    with _no_tracer_warnings() if traced else nullcontext():
        check_arguments(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            num_batches_tracked,
            residual,
            activation,
            activation_param,
            running_var_correction,
            nonfinite_batches,
        )
    if refusal is not None and not is_functionalized():  # which refuses operators that update buffers
        raise refusal
    options: dict[str, Any] = {"residual": residual, "activation": activation, "activation_param": activation_param}
    if traced:
        assert running_mean is not None
        assert running_var is not None
        return decompositions.batch_norm_inference(input, weight, bias, running_mean, running_var, eps, **options)
    if compiling and _extension.C is not None:
        # The operators as compilers see them; the pybind11 module is opaque to them.
        ops = torch.ops.normfused
        if training:
            buffers = (running_mean, running_var, num_batches_tracked)
            options |= {"correction": running_var_correction, "nonfinite_batches": nonfinite_batches}
            options["update_in_backward"] = update_in_backward
            results = ops.batch_norm_training(input, weight, bias, *buffers, momentum, eps, **options)
        else:
            results = ops.batch_norm_inference(input, weight, bias, running_mean, running_var, eps, **options)
        return results[0]  # type: ignore[no-any-return]
    return reference.batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked=num_batches_tracked,
        running_var_correction=running_var_correction,
        nonfinite_batches=nonfinite_batches,
        update_in_backward=update_in_backward,
        **options,
    )


@contextmanager
def _no_tracer_warnings() -> Iterator[None]:
    """Without the warnings of ``torch.jit.trace``, which sees each comparison of sizes that a check makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield


def channel_sums(input: Tensor) -> ChannelSums:
    """Count, sum, sum of squares, minimum and maximum of each channel, in one read.

    Args:
        input: shape ``(N, C, ...)``, any strides. Floating dtypes are summed in float64, integer dtypes exactly in
            int64 (the sums must fit).

    Returns:
        ``count`` (int, values per channel), and tensors of shape ``(C,)``, float64 or int64: ``sum``,
        ``sum_of_squares``, ``min``, ``max``. NaN where a channel holds one; for an empty channel 0, 0, and infinities
        or int64's limits. Not differentiable. For a variance of floating values use :func:`channel_moments`, which does
        not cancel.

    Raises:
        ValueError: fewer than two dimensions. TypeError: bool or complex input.
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
    """Count, mean, squared deviations, minimum and maximum of each channel, in one read.

    Args:
        input: shape ``(N, C, ...)``, float32, float64, float16 or bfloat16, any strides.

    Returns:
        ``count`` (int, values per channel), and float64 tensors of shape ``(C,)``: ``mean``, ``m2`` (the sum of squared
        deviations from the mean: ``m2 / count`` is the biased variance), ``min``, ``max``. NaN where a channel holds
        one; for an empty channel 0, 0, inf, -inf. Not differentiable.

    Raises:
        ValueError: fewer than two dimensions. TypeError: input that is not floating.

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
    """Divide each value by a power of the squares of the ``size`` channels about it.

    ``input / (k + alpha / size * sum(input[:, c - size // 2 : c + (size - 1) // 2 + 1] ** 2)) ** beta`` for channel
    ``c``, with zeros outside of the channels. Drop-in for :func:`torch.nn.functional.local_response_norm`.

    Args:
        input: shape ``(N, C, ...)`` with at least one more dimension, float32, float64, float16 or bfloat16, any
            strides. All arithmetic is in float32, or float64 for that.
        size: channels of the window, at least 1; of an even number one more lies before than after.
        alpha, beta, k: as above.

    Returns:
        Shape, dtype and memory format of ``input``. Differentiable any number of times; for backward only ``input`` is
        kept. An empty input gives an empty output.

    Raises:
        ValueError: fewer than three dimensions, or a size below 1. TypeError: a dtype that is not supported, or an
            argument that is no number. RuntimeError: a CUDA tensor where the extension was built without CUDA.

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
            refusal = error  # in few words; the check finds the argument and says what it must be
    check_local_response_norm(input, size, alpha, beta, k)
    if dtensor.is_dtensor(input):
        return dtensor.local_response_norm(local_response_norm, input, size, alpha, beta, k)
    if refusal is not None:
        raise refusal
    if compiling:
        output: Tensor = torch.ops.normfused.local_response_norm(input, size, alpha, beta, k)
        return output
    return reference.local_response_norm(input, size, alpha, beta, k)
