"""The functions of :mod:`normfused.functional` in plain torch.

They are the oracle of the tests, and run if the extension cannot be loaded. All arithmetic is in float64, and autograd
differentiates it. Arguments are not checked.

Example:
    >>> import torch
    >>> from normfused import functional, reference
    >>> x = torch.arange(12.0).view(2, 3, 2)
    >>> torch.allclose(functional.batch_norm(x, None, None, training=True),
    ...                reference.batch_norm(x, None, None, training=True))
    True
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from normfused._torch_private import is_batched, is_in_backward, is_wrapped, suggest_memory_format, write_buffer
from normfused.activations import ACTIVATIONS
from normfused.layout import as_dense, keep_layout, laid_out_as, values_per_channel
from normfused.results import ChannelMoments, ChannelSums

__all__ = [
    "batch_norm",
    "channel_moments",
    "channel_sums",
    "group_norm",
    "layer_norm",
    "local_response_norm",
    "normalize",
]


def _by_channel(input: Tensor) -> Tensor:
    """``input`` as a matrix of shape (C, values per channel)."""
    return input.transpose(0, 1).reshape(input.size(1), values_per_channel(input))


def _mean_and_deviations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each row, shape (C, 1), and the row's deviations from it.

    The mean is computed relative to the row's first value: the mean of a constant row is exactly that constant. A row
    with infinities gives NaN that way, and has its plain mean.
    """
    pivot = rows[:, :1].detach()
    mean = pivot + (rows - pivot).mean(1, keepdim=True)
    mean = torch.where(mean.isnan(), rows.mean(1, keepdim=True), mean)
    return mean, rows - mean


def _batch_statistics(x: Tensor, all_sum: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, and the number of values per channel; of all ranks with ``all_sum``."""
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
    # the parameters of functional.batch_norm
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
    """:func:`normfused.functional.batch_norm` in plain torch. Running statistics and counters are updated in place.

    Args:
        input: shape ``(N, C, ...)``. The other arguments are those of the function too, without its defaults for
            ``activation`` and ``activation_param``.
        update_in_backward: if False, a call inside a backward pass, which is a recomputation, updates no buffer.
        all_sum: sums a tensor over processes. In training the statistics are then those of all processes.

    Returns:
        Shape, dtype and memory format of ``input``.

    Raises:
        ValueError: with ``all_sum``, one value per channel on all ranks together.

    Example:
        >>> import torch
        >>> y = batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=0.0)
        >>> y.tolist()
        [[-1.0], [1.0]]
    """
    x = as_dense(keep_layout(input)).double()
    shape = [1, -1] + [1] * (input.dim() - 2)
    if training:
        mean, var, count = _batch_statistics(x, all_sum)
        if count == 1 and all_sum is not None:
            raise ValueError("expected more than 1 value per channel when training, got 1 on all ranks together")
        if count != 0 and (update_in_backward or not is_in_backward()):
            new_var = var * count / (count - running_var_correction)
            updates = None if update_in_backward or not torch.compiler.is_compiling() else _outside_backward(mean)
            buffers = _Buffers(running_mean, running_var, num_batches_tracked, nonfinite_batches)
            # Detached, because buffers have no derivative, in reverse or forward mode.
            _update(buffers, momentum, mean.detach(), new_var.detach(), updates)
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


def group_norm(
    # the parameters of functional.group_norm
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> Tensor:
    """:func:`normfused.functional.group_norm` in plain torch. ``weight`` and ``bias``: shape ``(C,)`` or ``(N, C)``.

    Example:
        >>> import torch
        >>> group_norm(torch.tensor([[[1.0], [3.0]]]), 1, eps=0.0).flatten().tolist()
        [-1.0, 1.0]
    """
    return group_norm_with_statistics(input, num_groups, weight, bias, eps, residual, activation, activation_param)[0]


def group_norm_with_statistics(
    # the parameters of the operator
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The output of :func:`group_norm`, and mean and inverse standard deviation of each group, shape (2, N, groups)."""
    x = as_dense(keep_layout(input)).double()
    statistics = (2, input.size(0), num_groups)
    if input.numel() == 0:
        y, found = x, x.new_zeros(statistics)
    else:
        mean, deviations = _mean_and_deviations(x.reshape(input.size(0) * num_groups, -1))
        invstd = (deviations.square().mean(1, keepdim=True) + eps).rsqrt()
        y, found = (deviations * invstd).view(input.shape), torch.stack((mean, invstd)).view(statistics)
    shape = (-1, input.size(1), *[1] * (input.dim() - 2))
    if weight is not None:
        y = y * weight.double().view(shape)
    if bias is not None:
        y = y + bias.double().view(shape)
    if residual is not None:
        y = y + residual.double()
    return laid_out_as(ACTIVATIONS[activation](y, activation_param).to(input.dtype), input), found


def layer_norm(
    # the parameters of the operator
    input: Tensor,
    start_dim: int,
    end_dim: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    subtract_mean: bool = True,
) -> Tensor:
    """:func:`normfused.functional.layer_norm` over dimensions ``start_dim`` to ``end_dim``; or ``rms_norm``.

    ``weight`` and ``bias`` have the shape of these dimensions, or that of dimension 0 before it.

    Example:
        >>> import torch
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), 1, 1, eps=0.0).tolist()
        [[-1.0, 1.0]]
    """
    return layer_norm_with_sum(input, start_dim, end_dim, weight, bias, eps, residual, subtract_mean)[0]


def layer_norm_with_sum(
    # the parameters of the operator
    input: Tensor,
    start_dim: int,
    end_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    subtract_mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """The output of :func:`layer_norm`, and what was normalized: ``input + residual``."""
    total = input if residual is None else input + residual
    x, dims = total.double(), tuple(range(start_dim, end_dim + 1))
    normalized = input.shape[start_dim : end_dim + 1]
    if subtract_mean and input.numel() > 0:
        pivot = x.detach()[(slice(None),) * start_dim + (slice(0, 1),) * len(dims)]  # see _mean_and_deviations
        mean = pivot + (x - pivot).mean(dims, keepdim=True)
        x = x - torch.where(mean.isnan(), x.mean(dims, keepdim=True), mean)
    y = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt() if input.numel() > 0 else x
    for parameter, is_weight in ((weight, True), (bias, False)):
        if parameter is None:
            continue
        samples = parameter.shape[:1] if parameter.dim() > len(dims) else (1,)
        before = (*samples, *[1] * (start_dim - 1)) if start_dim > 0 else ()
        wide = parameter.double().reshape(*before, *normalized, *[1] * (input.dim() - 1 - end_dim))
        y = y * wide if is_weight else y + wide
    y = y.to(total.dtype)
    return (laid_out_as(y, total) if dims == (1,) else y.contiguous()), total


@torch.library.custom_op("normfused::outside_backward", mutates_args=())
def _outside_backward(like: Tensor) -> Tensor:
    """Whether this thread is outside a backward pass, 0-d bool; evaluated when compiled code runs."""
    return torch.tensor(not is_in_backward(), device=like.device)


@_outside_backward.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


class _Buffers(NamedTuple):
    """What a training forward updates in place."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    nonfinite_batches: Tensor | None


@torch.no_grad()
def _update(
    buffers: _Buffers, momentum: float | None, new_mean: Tensor, new_var: Tensor, updates: Tensor | None
) -> None:
    """Update the buffers in place. ``updates``, a 0-d bool tensor, says whether to; ``None``: yes."""
    running_mean, running_var, num_batches_tracked, nonfinite_batches = buffers
    written = [b for b in buffers if b is not None]
    for b in written:
        _check_can_be_updated(b, new_mean)
    for b in written:
        write_buffer(b, b * 1)  # raises where torch refuses to write, before anything is written
    if num_batches_tracked is not None:
        write_buffer(num_batches_tracked, num_batches_tracked + (1 if updates is None else updates))
    updated = torch.ones_like(new_mean, dtype=torch.bool) if updates is None else updates.expand(new_mean.shape)
    if nonfinite_batches is not None:
        finite = new_mean.isfinite() & new_var.isfinite()
        write_buffer(nonfinite_batches, nonfinite_batches + (updated & ~finite))
        updated = updated & finite
    for buffer, value in ((running_mean, new_mean), (running_var, new_var)):
        if buffer is None:
            continue
        if momentum is None:
            assert num_batches_tracked is not None
            factor: float | Tensor = 1 / num_batches_tracked.double()
        else:
            factor = momentum
        write_buffer(buffer, torch.where(updated, (1 - factor) * buffer.double() + factor * value, buffer.double()))


def _check_can_be_updated(buffer: Tensor, values: Tensor) -> None:
    """Raise ``NotImplementedError`` if vmap batches the new values of a running statistic, but not the statistic."""
    if buffer.dim() == 0 or is_wrapped(buffer):  # 0-d: the counter, which has no batched values
        return
    if is_batched(values):
        raise NotImplementedError(
            "batch_norm: vmap over the input cannot update running statistics that vmap does not batch too. "
            "Construct the layer with track_running_stats=False, call torch.func.replace_all_batch_norm_modules_, "
            "call functional.batch_norm without running statistics, or use eval mode"
        )


def channel_sums(input: Tensor) -> ChannelSums:
    """:func:`normfused.channel_sums` in plain torch.

    Example:
        >>> import torch
        >>> channel_sums(torch.tensor([[1, 2], [3, 4]])).sum.tolist()
        [4, 6]
    """
    if not input.is_floating_point():
        rows = integer_sums(input)
        total, squares = _joined("sum", rows[:2]), _joined("sum of squares", rows[2:6])
        return ChannelSums(values_per_channel(input), total, squares, rows[6], rows[7])
    rows, count = _by_channel(input.double()), values_per_channel(input)
    if count == 0:
        zeros = rows.new_zeros(input.size(1))
        return ChannelSums(0, zeros, zeros.clone(), zeros + torch.inf, zeros - torch.inf)
    return ChannelSums(count, rows.sum(1), rows.square().sum(1), rows.amin(1), rows.amax(1))


def integer_sums(input: Tensor) -> Tensor:
    """Exact sums of integers, int64 of shape (8, C).

    Rows 0 and 1 are the digits of the sum in base 2^32, rows 2 to 5 those of the sum of squares; the last digit of each
    has the sign. Rows 6 and 7 are the minimum and the maximum.

    Example:
        >>> import torch
        >>> integer_sums(torch.tensor([[2**40], [2**40]]))[:, 0].tolist()
        [0, 512, 0, 0, 131072, 0, 1099511627776, 1099511627776]
    """
    x, limits = _by_channel(input.long()), torch.iinfo(torch.int64)
    quarters = [*(x >> shift & 0xFFFF for shift in (0, 16, 32)), x >> 48]
    total, squares = [x.new_zeros(x.size(0)) for _ in range(2)], [x.new_zeros(x.size(0)) for _ in range(4)]

    def add(digits: list[Tensor], values: Tensor, quarter: int) -> None:
        """Add values times 2^(16 quarter)."""
        digit, is_odd = divmod(quarter, 2)
        digits[digit] += (values & 0xFFFF) << 16 if is_odd else values
        if is_odd:
            digits[digit + 1] += values >> 16

    for i, a in enumerate(quarters):
        add(total, a.sum(1), i) if i < 3 else total[1].add_(a.sum(1) << 16)
        for j, b in enumerate(quarters):
            add(squares, (a * b).sum(1), i + j)
    for digits in (total, squares):
        for low, high in itertools.pairwise(digits):
            high += low >> 32
            low &= 0xFFFFFFFF
    extremes = (x.amin(1), x.amax(1)) if x.size(1) else (torch.full_like(total[0], v) for v in (limits.max, limits.min))
    return torch.stack([*total, *squares, *extremes])


def value_counts(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded values of each channel in ascending order, without NaN and infinities, and how often each occurs.

    Integers from -2^15 to 2^16 - 1 are exact; larger ones and floating values are rounded to 11 significant bits.

    Returns:
        The values of all channels one after another, float64; their counts, int64; the number of values of each
        channel, shape (C,), int64.

    Example:
        >>> import torch
        >>> values, counts, sizes = value_counts(torch.tensor([[0.25], [0.25], [1 + 2**-12]]))
        >>> values.tolist(), counts.tolist(), sizes.tolist()
        ([0.25, 1.0], [2, 1], [2])
    """
    found = [torch.unique(row[row.isfinite()], return_counts=True) for row in map(_rounded, _by_channel(input))]
    values, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, counts, torch.tensor([len(value) for value, _ in found])


def _rounded(x: Tensor) -> Tensor:
    dropped, largest = 52 - 10, (2 - 2**-10) * 2.0**1023
    wide = x.double()
    bits = wide.contiguous().view(torch.int64) + (1 << dropped - 1)
    rounded = (bits >> dropped << dropped).view(torch.float64).clamp(-largest, largest) + 0.0  # 0.0 for -0.0
    if not x.is_floating_point():
        return torch.where((wide >= -(2**15)) & (wide < 2**16), wide, rounded)
    return torch.where(wide.isfinite(), rounded, wide)


def _joined(what: str, digits: Tensor) -> Tensor:
    """The numbers with these digits. Raise ``ValueError`` if one does not fit int64."""
    if not ((digits[1] == digits[1].int()) & (digits[2:] == 0).all(0)).all():
        raise ValueError(f"channel_sums: the {what} of a channel exceeds int64; normfused.ChannelStats has no limit")
    return digits[0] + (digits[1] << 32)


def channel_moments(input: Tensor) -> ChannelMoments:
    """:func:`normfused.channel_moments` in plain torch.

    Example:
        >>> import torch
        >>> channel_moments(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).mean.tolist()
        [2.0, 3.0]
    """
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
    """:func:`normfused.normalize` in plain torch, for shapes ``(N, C, H, W)`` and ``(C, H, W)``.

    ``mean`` and ``std`` hold one number per channel.

    Example:
        >>> import torch
        >>> normalize(torch.full((1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.5], 1 / 255).item()
        1.0
    """
    if input.dim() == 3:
        return normalize(input.unsqueeze(0), mean, std, scale, dtype, memory_format).squeeze(0)
    center, deviation = (input.new_tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    output = (input.double() * scale - center) / deviation
    if memory_format == torch.preserve_format:
        memory_format = suggest_memory_format(input)
    dtype = dtype or (torch.float32 if input.dtype == torch.uint8 else input.dtype)
    return output.to(dtype).contiguous(memory_format=memory_format)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """:func:`normfused.functional.local_response_norm` in plain torch.

    Example:
        >>> import torch
        >>> local_response_norm(torch.ones(1, 1, 1), size=1, alpha=1.0, beta=1.0).item()
        0.5
    """
    x = as_dense(keep_layout(input)).double()
    # Channels outside of the input count as zeros, so that padding by more than C channels changes nothing.
    left, right = (min(side, input.size(1)) for side in (size // 2, (size - 1) // 2))
    squares = F.pad(x.square(), (*[0, 0] * (input.dim() - 2), left, right))
    sums = torch.zeros_like(x)
    for first in range(left + 1 + right):
        sums = sums + squares.narrow(1, first, input.size(1))
    return laid_out_as((x * (k + alpha / size * sums).pow(-beta)).to(input.dtype), input)
