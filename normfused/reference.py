"""The same functions in plain torch: the oracle of the tests, and the fallback without the extension.

Everything is computed in float64 and differentiable by torch's own autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F

# What may follow the normalization, by name: a function of its input and of a parameter.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": lambda z, _: F.hardswish(z),
    "sigmoid": lambda z, _: z.sigmoid(),
    "tanh": lambda z, _: z.tanh(),
    "silu": lambda z, _: z * z.sigmoid(),  # torch's own has no forward mode over its backward
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
}
# The parameter where none is given: leaky ReLU's negative slope, ELU's alpha.
ACTIVATION_PARAMS = {"leaky_relu": 0.01, "elu": 1.0}


class ChannelSums(NamedTuple):
    """Per channel: how many values there are, their sum, the sum of their squares, the least and the greatest."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    sum: Tensor
    sum_of_squares: Tensor
    min: Tensor
    max: Tensor


class ChannelMoments(NamedTuple):
    """Per channel: how many values there are, their mean, squared deviations, minimum and maximum."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    m2: Tensor
    min: Tensor
    max: Tensor


def values_per_channel(input: Tensor) -> int:
    """Number of values that each channel (dim 1) of `input` has."""
    return input.numel() // max(input.size(1), 1)


def as_dense(input: Tensor) -> Tensor:
    """`input` where it is dense as channels first or channels last, else a copy in the format torch suggests for it."""
    if input.is_contiguous() or input.movedim(1, -1).is_contiguous():
        return input
    return input.contiguous(memory_format=torch._prims_common.suggest_memory_format(input))


def _strides_of_view(input: Tensor) -> tuple[int, ...]:
    return torch.empty_like(as_dense(input), device="meta").stride()


def _laid_out(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    # Made from `values`: vmap may have batched them and not the tensor that the strides are from.
    return values.new_empty_strided(values.shape, strides).copy_(values)


def laid_out_as(values: Tensor, input: Tensor) -> Tensor:
    """`values` in the layout that results of `input` have."""
    return _laid_out(values, _strides_of_view(input))


class _KeepLayout(torch.autograd.Function):
    """The identity, whose gradient has the memory layout of its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.strides = _strides_of_view(input)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _laid_out(grad, ctx.strides)


def _keep_layout(input: Tensor) -> Tensor:
    """``input``, whose gradient has its memory layout; in transforms the layout is left to torch."""
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return input
    output: Tensor = _KeepLayout.apply(input)  # type: ignore[no-untyped-call]
    return output


def _by_channel(input: Tensor) -> Tensor:
    """`input` as (C, values), in its own order."""
    return input.transpose(0, 1).reshape(input.size(1), values_per_channel(input))


def _mean_and_deviations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each row, and what is left when it is taken off.

    Relative to the first value, so that a constant row has that very constant for a mean. Infinities make that NaN;
    there the plain mean stands.
    """
    pivot = rows[:, :1].detach()
    mean = pivot + (rows - pivot).mean(1, keepdim=True)
    mean = torch.where(mean.isnan(), rows.mean(1, keepdim=True), mean)
    return mean, rows - mean


def _batch_statistics(x: Tensor, all_sum: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, and how many values they are of."""
    count = values_per_channel(x)
    if all_sum is not None:
        count = int(all_sum(torch.tensor(count, device=x.device)))
    if count == 0:
        return x.new_zeros(x.size(1)), x.new_ones(x.size(1)), 0
    rows = _by_channel(x)
    if all_sum is None:
        mean, deviations = _mean_and_deviations(rows)
        return mean[:, 0], deviations.square().mean(1), count
    mean = all_sum(rows.sum(1)) / count
    return mean, all_sum((rows - mean.unsqueeze(1)).square().sum(1)) / count, count


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
    activation: str = "identity",
    activation_param: float = 0.0,
    running_var_correction: int = 1,
    nonfinite_batches: Tensor | None = None,
    update_in_backward: bool = True,
    all_sum: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """:func:`normfused.functional.batch_norm` in plain torch, without its argument checks and defaults.

    With ``all_sum``, which sums a tensor over processes, the batch in training is that of all of them.
    """
    x = as_dense(_keep_layout(input)).double()
    shape = [1, -1] + [1] * (input.dim() - 2)
    if training:
        mean, var, count = _batch_statistics(x, all_sum)
        if count == 1 and all_sum is not None:
            raise ValueError("expected more than 1 value per channel when training, got 1 on all ranks together")
        if count != 0 and (update_in_backward or not is_in_backward()):
            new_var = var * count / (count - running_var_correction)
            updates = None if update_in_backward or not torch.compiler.is_compiling() else _outside_backward(mean)
            statistics = mean.detach(), new_var.detach()  # buffers have no derivative, in either mode
            _update(running_mean, running_var, num_batches_tracked, nonfinite_batches, momentum, *statistics, updates)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.double(), running_var.double()
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    y = (x - mean.view(shape)) * scale.view(shape)
    if bias is not None:
        y = y + bias.double().view(shape)
    if residual is not None:
        y = y + residual.double()
    y = ACTIVATIONS[activation](y, activation_param)
    return laid_out_as(y.to(input.dtype), input)


def is_in_backward() -> bool:
    """Whether this thread is inside a backward pass; never in code that is being compiled, which runs later."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("normfused::outside_backward", mutates_args=())
def _outside_backward(like: Tensor) -> Tensor:
    """Whether this thread is outside of any backward pass, 0-d bool, found when compiled code runs."""
    return torch.tensor(not is_in_backward(), device=like.device)


@_outside_backward.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


@torch.no_grad()
def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    momentum: float | None,
    new_mean: Tensor,
    new_var: Tensor,
    updates: Tensor | None,
) -> None:
    """Write the buffers; where ``updates``, 0-d bool, is given and false, the values that they have."""
    written = [b for b in (running_mean, running_var, num_batches_tracked, nonfinite_batches) if b is not None]
    for b in written:
        _check_can_be_updated(b, new_mean)
    for b in written:
        _write(b, b * 1)  # raises where torch refuses to write, before anything is written
    if num_batches_tracked is not None:
        _write(num_batches_tracked, num_batches_tracked + (1 if updates is None else updates))
    taken = torch.ones_like(new_mean, dtype=torch.bool) if updates is None else updates.expand(new_mean.shape)
    if nonfinite_batches is not None:
        finite = new_mean.isfinite() & new_var.isfinite()
        _write(nonfinite_batches, nonfinite_batches + (taken & ~finite))
        taken = taken & finite
    for buffer, value in ((running_mean, new_mean), (running_var, new_var)):
        if buffer is None:
            continue
        if momentum is None:
            assert num_batches_tracked is not None
            factor: float | Tensor = 1 / num_batches_tracked.double()
        else:
            factor = momentum
        _write(buffer, torch.where(taken, (1 - factor) * buffer.double() + factor * value, buffer.double()))


def _check_can_be_updated(buffer: Tensor, values: Tensor) -> None:
    """Raise ``NotImplementedError`` where ``vmap`` batches the values, but not the buffer (not its counter)."""
    if buffer.dim() == 0 or _is_wrapped(buffer):
        return
    while _is_wrapped(values):
        if torch._C._functorch.is_batchedtensor(values):
            raise NotImplementedError(
                "batch_norm: vmap over the input cannot update running statistics that vmap does not batch too. "
                "Construct the layer with track_running_stats=False, call torch.func.replace_all_batch_norm_modules_, "
                "call functional.batch_norm without running statistics, or use eval mode"
            )
        values = torch._C._functorch.get_unwrapped(values)


def _is_wrapped(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():  # which cannot trace the question; functorch refuses what would be wrong
        return False
    return torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _write(buffer: Tensor, values: Tensor) -> None:
    """Write over a buffer; that of a layer, which torch.func's transforms do not wrap, below these."""
    if not _is_wrapped(values) or _is_wrapped(buffer):
        buffer.copy_(values)
        return
    while _is_wrapped(values):
        if torch._is_functional_tensor(values):
            torch._functionalize_sync(values)
        values = torch._C._functorch.get_unwrapped(values)
    with temporarily_clear_interpreter_stack():
        buffer.copy_(values)


def channel_sums(input: Tensor) -> ChannelSums:
    """:func:`normfused.functional.channel_sums` in plain torch."""
    floating = input.is_floating_point()
    rows, count = _by_channel(input.double() if floating else input.long()), values_per_channel(input)
    if count == 0:
        zeros = rows.new_zeros(input.size(1))
        low, high = (
            (-torch.inf, torch.inf) if floating else (torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max)
        )
        return ChannelSums(0, zeros, zeros.clone(), torch.full_like(zeros, high), torch.full_like(zeros, low))
    return ChannelSums(count, rows.sum(1), rows.square().sum(1), rows.amin(1), rows.amax(1))


def channel_moments(input: Tensor) -> ChannelMoments:
    """:func:`normfused.functional.channel_moments` in plain torch."""
    rows, count = _by_channel(input.double()), values_per_channel(input)
    if count == 0:
        zeros = rows.new_zeros(input.size(1))
        return ChannelMoments(0, zeros, zeros.clone(), zeros + torch.inf, zeros - torch.inf)
    mean, deviations = _mean_and_deviations(rows)
    return ChannelMoments(count, mean[:, 0], deviations.square().sum(1), rows.amin(1), rows.amax(1))


def normalize(
    input: Tensor,
    mean: list[float],
    std: list[float],
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """:func:`normfused.functional.normalize` in plain torch, of shape ``(N, C, H, W)`` or ``(C, H, W)``."""
    if input.dim() == 3:
        return normalize(input.unsqueeze(0), mean, std, scale, dtype, memory_format).squeeze(0)
    centre, deviation = (input.new_tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    output = (input.double() * scale - centre) / deviation
    if memory_format == torch.preserve_format:
        memory_format = torch._prims_common.suggest_memory_format(input)
    dtype = dtype or (torch.float32 if input.dtype == torch.uint8 else input.dtype)
    return output.to(dtype).contiguous(memory_format=memory_format)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """:func:`normfused.functional.local_response_norm` in plain torch, without its argument checks."""
    x = as_dense(_keep_layout(input)).double()
    # Beyond the channels there are only zeros, however many the window has of them.
    before, after = (min(side, input.size(1)) for side in (size // 2, (size - 1) // 2))
    squares = F.pad(x.square(), (*[0, 0] * (input.dim() - 2), before, after))
    sums = torch.zeros_like(x)
    for first in range(before + 1 + after):
        sums = sums + squares.narrow(1, first, input.size(1))
    return laid_out_as((x * (k + alpha / size * sums).pow(-beta)).to(input.dtype), input)
