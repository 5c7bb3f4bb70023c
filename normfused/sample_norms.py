"""Norms whose statistics are those of one sample, as functions: group norm and instance norm."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normfused import _extension, decompositions, reference
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS
from normfused.arguments import (
    check_activation,
    check_input,
    check_number,
    check_parameter,
    in_float32,
    is_autocast,
    modulated_parameters,
)
from normfused.checks import needs_torchs_operators
from normfused.residuals import check_residual, split_residual

__all__ = ["group_norm", "instance_norm"]


class GroupNormCall(NamedTuple):
    """One call of group norm: the arguments of :func:`group_norm`, and its name in errors."""

    name: str
    input: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None
    activation: str | None = None
    activation_param: float | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalize each group of channels of each sample; optionally modulate, add a residual and apply an activation.

    ``activation(((input - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift + residual)``, with mean and
    biased variance over the channels of a group and all positions. A drop-in for
    :func:`torch.nn.functional.group_norm`.

    On the CPU the result for a sample, and its gradient with respect to ``input``, do not depend on the other samples:
    they are the same to the last bit in every batch, at every place, with any number of threads.

    Args:
        input: shape ``(N, C, ...)``, float32, float64, float16 or bfloat16, any strides.
        num_groups: number of groups, which divides ``C``. A group is ``C / num_groups`` neighboring channels.
        weight, bias: shape ``(C,)``; default 1 and 0; ``input``'s dtype, or float32 if ``input`` is float16 or
            bfloat16. All arithmetic is in float32 or wider.
        eps: added to the variance; finite and not negative; default 1e-5.
        residual: added before the activation; ``input``'s shape and device. A different dtype is promoted as in
            ``group_norm(input) + residual``.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``,
            ``"silu"``, ``"gelu"``, ``"gelu_tanh"``; default none.
        activation_param: negative slope of leaky ReLU (default 0.01) or alpha of ELU (default 1).
        scale, shift: shape ``(N, C)``, one value for each channel of each sample, as in AdaGN and FiLM; dtypes as for
            ``weight``. Default 0.

    Returns:
        A new tensor of ``input``'s shape, dtype and memory format. Differentiable any number of times. Saved for
        backward are ``input``, the statistics, and for an activation after a residual the residual, or for ReLU one bit
        per element.

    Raises:
        ValueError: ``num_groups`` that does not divide ``C``; a single value in all of ``input``'s groups; shapes that
            do not fit; an unknown activation; a negative eps.
        TypeError: unsupported dtypes.

    Example:
        >>> x = torch.arange(8.0).view(1, 4, 2)
        >>> group_norm(x, 2, activation="relu").shape
        torch.Size([1, 4, 2])
        >>> group_norm(x, 2, eps=0.0)[0, 0]
        tensor([-1.3416, -0.4472])

    Source: Wu and He, 2018, arXiv:1803.08494;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.group_norm.html
    """
    return run_group_norm(
        *("group_norm", input, num_groups, weight, bias, eps, residual, activation, activation_param, scale, shift)
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalize each channel of each sample; optionally modulate, add a residual and apply an activation.

    A drop-in for :func:`torch.nn.functional.instance_norm`; :func:`group_norm` with as many groups as channels.

    Args:
        input: shape ``(N, C, ...)`` with at least one spatial dimension.
        running_mean, running_var: shape ``(C,)``. With ``use_input_stats`` they are updated in place with the averages
            over the batch of each sample's mean and unbiased variance. Otherwise they normalize the input.
        use_input_stats: whether each sample's own statistics are used. Default True.
        momentum: weight of the batch in the running statistics. Default 0.1.
        weight, bias, eps, residual, activation, activation_param, scale, shift: as in :func:`group_norm`. ``scale`` and
            ``shift`` need ``use_input_stats``.

    Raises:
        ValueError: one value per statistic with ``use_input_stats``; no running statistics without it; and the cases of
            :func:`group_norm`.

    Example:
        >>> instance_norm(torch.tensor([[[1.0, 3.0]]]), eps=0.0)
        tensor([[[-1.,  1.]]])

    Source: Ulyanov, Vedaldi and Lempitsky, 2016, arXiv:1607.08022;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.instance_norm.html
    """
    return run_instance_norm(
        "instance_norm", input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, residual,
        activation, activation_param, scale, shift,
    )  # fmt: skip


def run_group_norm(*fields: Any) -> Tensor:
    """:func:`group_norm` for functions and layers, with the fields of a :class:`GroupNormCall`."""
    return _run(*fields)[0]


def run_instance_norm(
    name: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """:func:`instance_norm` for functions and layers."""
    fields: tuple[Any, ...] = (
        *(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps),
        *(residual, activation, activation_param, scale, shift),
    )
    tensors = (input, running_mean, running_var, weight, bias, residual, scale, shift)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(run_instance_norm, tensors, name, *fields)
    check_input(name, input, 3)
    if (running_mean is None) != (running_var is None):
        given = "running_var" if running_mean is None else "running_mean"
        raise ValueError(f"{name}: running_mean and running_var must be given together, got only {given}")
    call = GroupNormCall(
        *(name, input, max(input.size(1), 1), weight, bias, eps, residual, activation, activation_param, scale, shift)
    )
    if not use_input_stats:
        return _by_running_statistics(call, running_mean, running_var)
    count = input.shape[2:].numel()
    if count == 1:
        raise ValueError(
            f"{name}: expected more than 1 value per channel of a sample, got input of shape {tuple(input.shape)}"
        )
    if needs_torchs_operators(torch.compiler.is_compiling()):
        return _instance_norm_by_torch(name, *fields)
    if running_mean is None or running_var is None:
        return _run(*call)[0]
    check_number(name, "momentum", momentum)
    _check_running(name, running_mean, running_var, input)
    output, statistics = _run(*call, with_statistics=True)
    if input.numel() > 0:
        with torch.no_grad():
            mean, invstd = statistics.detach()
            var = (invstd.pow(-2) - eps).clamp_min(0) * (count / (count - 1))
            for buffer, values in ((running_mean, mean), (running_var, var)):
                buffer.copy_((1 - momentum) * buffer.double() + momentum * values.mean(0))
    return output


def _by_running_statistics(call: GroupNormCall, running_mean: Tensor | None, running_var: Tensor | None) -> Tensor:
    """Instance norm in evaluation, which is batch norm."""
    from normfused.functional import run_batch_norm

    if call.scale is not None or call.shift is not None:
        raise ValueError(f"{call.name}: scale and shift need use_input_stats=True")
    kind = "identity" if call.activation is None else call.activation
    parameter = ACTIVATION_PARAMS.get(kind, 0.0) if call.activation_param is None else call.activation_param
    try:
        return run_batch_norm((
            call.name, None, call.input, running_mean, running_var, call.weight, call.bias, False, 0.0, call.eps,
            None, call.residual, kind, parameter, None, 1, None, False, True,
        ))  # fmt: skip
    except (TypeError, ValueError):  # of batch norm: say it of instance norm
        check_group_norm(call)
        _check_running(call.name, running_mean, running_var, call.input)
        raise


def _check_running(name: str, running_mean: Tensor | None, running_var: Tensor | None, input: Tensor) -> None:
    for argument, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        check_parameter(name, argument, buffer, input, (input.size(1),))


def run_instance_norm_layer(name: str, unbatched_dims: int, features: int, affine: bool, *fields: Any) -> Tensor:
    """:func:`run_instance_norm` for a layer, whose input may lack the batch dimension."""
    input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, residual, *rest = fields
    activation, activation_param, scale, shift = rest
    tensors = (input, residual, scale, shift)
    if has_torch_function_variadic(*tensors):
        arguments = (name, unbatched_dims, features, affine, *fields)
        return handle_torch_function(run_instance_norm_layer, tensors, *arguments)
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}")
    dims = input.dim()
    if dims not in (unbatched_dims, unbatched_dims + 1):
        raise ValueError(
            f"{name}: expected a {unbatched_dims}D or {unbatched_dims + 1}D input, got {dims}D input of shape "
            f"{tuple(input.shape)}"
        )
    is_unbatched = dims == unbatched_dims
    dim = 0 if is_unbatched else 1
    if input.size(dim) != features:
        if affine:
            raise ValueError(
                f"{name}: expected input's size at dim={dim} to match num_features ({features}), got {input.size(dim)}"
            )
        warnings.warn(
            f"input's size at dim={dim} does not match num_features. You can silence this warning by not passing in "
            "num_features, which is not used because affine=False",
            stacklevel=3,
        )
    if is_unbatched:
        input, residual, scale, shift = (None if t is None else t.unsqueeze(0) for t in tensors)
    output = run_instance_norm(
        *(name, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps),
        *(residual, activation, activation_param, scale, shift),
    )
    return output.squeeze(0) if is_unbatched else output


def _instance_norm_by_torch(name: str, *fields: Any) -> Tensor:
    """The call in torch's own operators, for ``torch.jit.trace``."""
    input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, residual, *rest = fields
    activation, activation_param, scale, shift = rest
    call = GroupNormCall(name, input, 1, weight, bias, eps, residual, activation, activation_param, scale, shift)
    check_group_norm(call)
    output = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    shape = (-1, input.size(1), *[1] * (input.dim() - 2))
    weight, bias = modulated(call)
    output = output if weight is None else output * weight.reshape(shape)
    output = (output if bias is None else output + bias.reshape(shape)).to(input.dtype)
    if residual is not None:
        output = output + residual
    kind = activation or "identity"
    parameter = ACTIVATION_PARAMS.get(kind, 0.0) if activation_param is None else activation_param
    return ACTIVATIONS[kind](output, parameter)


def _run(
    name: str,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    with_statistics: bool = False,
) -> tuple[Tensor, Any]:
    """The output, and with ``with_statistics`` the statistics of each group, shape (2, N, groups)."""
    fields = (name, input, num_groups, weight, bias, eps, residual, activation, activation_param, scale, shift)
    tensors = (input, weight, bias, residual, scale, shift)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(_run, tensors, *fields, with_statistics=with_statistics)
    plain = (
        isinstance(input, Tensor)
        and scale is None
        and shift is None
        and (residual is None or getattr(residual, "dtype", None) == input.dtype)
        # the operator also takes those of each sample
        and (weight is None or weight.dim() == 1)
        and (bias is None or bias.dim() == 1)
    )
    compiling = torch.compiler.is_compiling()
    if not plain or compiling or with_statistics or _extension.C is None or needs_torchs_operators(compiling):
        return _run_checked(GroupNormCall(*fields), with_statistics)
    kind = "identity" if activation is None else activation
    if activation_param is None:
        activation_param = ACTIVATION_PARAMS.get(kind, 0.0)
    try:
        if input.numel() == num_groups or is_autocast(input):
            return _run_checked(GroupNormCall(*fields), False)
        output = _extension.C.group_norm(input, num_groups, weight, bias, eps, residual, kind, activation_param, False)
        return output, None
    except (RuntimeError, TypeError, ValueError) as error:
        refusal = error
    check_group_norm(GroupNormCall(*fields))
    raise refusal


def _run_checked(call: GroupNormCall, with_statistics: bool) -> tuple[Tensor, Any]:
    """The call in all cases but the fast one."""
    if isinstance(call.input, Tensor) and is_autocast(call.input):
        call = in_float32(call)
    check_group_norm(call)
    kind = call.activation or "identity"
    parameter = ACTIVATION_PARAMS.get(kind, 0.0) if call.activation_param is None else call.activation_param
    input, weight, bias = call.input, *modulated(call)
    residual, after = split_residual(input, call.residual, call.name)
    if after is not None:
        kind, followed_by, parameter_after = "identity", kind, parameter
    if needs_torchs_operators(torch.compiler.is_compiling()):
        assert not with_statistics
        output = decompositions.group_norm(input, call.num_groups, weight, bias, call.eps, residual, kind, parameter)
        results: tuple[Tensor, ...] = (output, output)
    elif _extension.C is None:
        results = reference.group_norm_with_statistics(
            input, call.num_groups, weight, bias, call.eps, residual, kind, parameter
        )
    else:
        operator = torch.ops.normfused.group_norm
        results = operator(input, call.num_groups, weight, bias, call.eps, residual, kind, parameter)
    if after is None:
        return results[0], results[1]
    return ACTIVATIONS[followed_by](results[0] + after, parameter_after), results[1]


def modulated(call: GroupNormCall) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias with which ``norm(input) * weight + bias`` includes ``scale`` and ``shift``: of each sample."""
    return modulated_parameters(call.input.dtype, call.weight, call.bias, call.scale, call.shift)


def check_group_norm(call: GroupNormCall) -> None:
    """Raise ``TypeError`` or ``ValueError`` for invalid arguments of group norm."""
    name, input, groups = call.name, call.input, call.num_groups
    check_input(name, input, 2)
    channels = input.size(1)
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"{name}: num_groups must be an int, got {type(groups).__name__}")
    if groups < 1 or channels % groups != 0:
        raise ValueError(
            f"{name}: num_groups must divide the number of channels, got {groups} for input of shape "
            f"{tuple(input.shape)}, which has {channels} channels"
        )
    if input.numel() == groups:
        raise ValueError(f"{name}: expected more than 1 value per group, got input of shape {tuple(input.shape)}")
    for argument in ("weight", "bias"):
        check_parameter(name, argument, getattr(call, argument), input, (channels,))
    for argument in ("scale", "shift"):
        check_parameter(name, argument, getattr(call, argument), input, (input.size(0), channels))
    check_number(name, "eps", call.eps, least=0)
    if call.residual is not None:
        check_residual(input, call.residual, name)
    kind = call.activation or "identity"
    check_activation(name, kind, call.activation_param or 0.0)
