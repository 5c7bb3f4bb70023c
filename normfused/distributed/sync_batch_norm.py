"""Batch norm over the batches of several ranks: the collectives, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfused import _extension, _torch_private, reference
from normfused.activations import ACTIVATIONS
from normfused.arguments import BatchNormCall, check_arguments, check_shape
from normfused.distributed import dtensor, rank_consistency
from normfused.distributed.rank_consistency import Group
from normfused.functional import run_by_reference
from normfused.layout import as_dense, values_per_channel
from normfused.masks import check_mask, masked_rows, positions_of, unmasked
from normfused.residuals import split_residual

Positions = tuple[Tensor, ...]


class Call(BatchNormCall):
    """A call of a synchronized layer."""

    __slots__ = ()

    def check(self) -> None:
        """Raise if an argument of this rank is invalid."""
        dtensor.refuse(self.name, "input", self.input)  # a device mesh and a process group exclude each other
        check_shape(self.name, self.input_dims, self.input, False, True)
        if self.input.size(1) == 0:
            raise ValueError(f"{self.name}: input of shape {tuple(self.input.shape)} has no channels (dim 1)")
        if self.mask is not None:
            check_mask(self.name, self.mask, self.input)
        check_arguments(self._replace(training=True))

    def of_rows(self, positions: Positions | None) -> Call:
        """The call for these positions only, as rows of a matrix. ``None``: all positions, unchanged."""
        if positions is None:
            return self
        rows, residual = masked_rows(positions, self.input, self.residual)
        return self._replace(input=rows, residual=residual)

    def without_rest(self) -> tuple[Call, Tensor | None]:
        """The call that the operators support, and the residual to add afterwards, before the activation, if any."""
        residual, rest = split_residual(self.input, self.residual)
        return self._replace(residual=residual, activation=self.activation if rest is None else "identity"), rest

    def own_count(self) -> int:
        """Values per channel on this rank. 0 if it depends on the values of a mask while compiling.

        The operator then compares the count of all ranks instead.
        """
        return 0 if self.mask is not None and torch.compiler.is_compiling() else values_per_channel(self.input)

    def signature(self, label: str) -> str:
        """A description of the call that must be the same on all ranks."""
        sources = {"input": self.input, "weight": self.weight, "bias": self.bias} if torch.is_grad_enabled() else {}
        needs = ", ".join(name for name, tensor in sources.items() if tensor is not None and tensor.requires_grad)
        return f"forward of {label} ({self.input.size(1)} channels of {self.input.dtype}, gradients of: {needs or '-'})"


def synchronized(group: Group, labels: list[str], calls: list[Call]) -> list[Tensor]:
    """The outputs of all calls in training, with one collective. ``labels`` name the layers in errors.

    Running statistics and counters of the calls are updated in place.

    Raises:
        RuntimeError: the collective fails. Otherwise as :class:`normfused.SyncBatchNorm`.
    """
    _refuse_transforms()
    places = [None if call.mask is None else positions_of(call.mask) for call in calls]
    rows = list(map(Call.of_rows, calls, places))
    if rank_consistency.is_enabled():
        rank_consistency.check_all(group, ", ".join(map(Call.signature, rows, labels)))
    operands, rests = zip(*map(Call.without_rest, rows), strict=True)
    try:
        outputs = (_by_reference if _extension.C is None else _by_kernels)(group, labels, list(operands))
    except ValueError as error:
        raise ValueError(f"{' and '.join(labels)}: {error}") from error
    return [_finished(*results) for results in zip(calls, places, outputs, rests, strict=True)]


def _finished(call: Call, positions: Positions | None, output: Tensor, rest: Tensor | None) -> Tensor:
    if rest is not None:
        output = ACTIVATIONS[call.activation](output + rest, call.activation_param)
    return output if positions is None else unmasked(positions, output, call.input)


def _refuse_transforms() -> None:
    if _torch_private.is_transformed():
        raise NotImplementedError("SyncBatchNorm: torch.func and forward-mode differentiation are not supported")


# ---- collectives -----------------------------------------------------------------------------------------------------
# The functional collectives, because compilers support them.


def gather(tensor: Tensor, group: Group, label: str) -> Tensor:
    """The tensors of all ranks as the rows of a matrix."""
    collective = torch.ops._c10d_functional.all_gather_into_tensor
    return _done(label, collective, tensor, group.size, group.name).view(group.size, -1)


def _sum(tensor: Tensor, group: Group, label: str) -> Tensor:
    return _done(label, torch.ops._c10d_functional.all_reduce, tensor, "sum", group.name)


def _done(label: str, collective: Callable[..., Tensor], *arguments: Any) -> Tensor:
    wait: Callable[[Tensor], Tensor] = torch.ops._c10d_functional.wait_tensor
    if torch.compiler.is_compiling():
        return wait(collective(*arguments))
    try:
        with _torch_private.below_autograd():  # above autograd these operators are Python and take 30 us a call
            return wait(collective(*arguments))
    except RuntimeError as error:
        raise RuntimeError(f"{label}: the collective failed: {error}") from error


class _AllSum(torch.autograd.Function):
    """The sum over all ranks. Its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, label: str) -> Tensor:
        ctx.group, ctx.label = group, label
        return _sum(tensor, group, label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if rank_consistency.is_enabled():
            rank_consistency.check_all(ctx.group, f"backward of {ctx.label}")
        return _AllSum.apply(grad.contiguous(), ctx.group, ctx.label), None, None  # type: ignore[no-untyped-call]


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _kernels() -> Any:
    return torch.ops.normfused if torch.compiler.is_compiling() else _extension.C


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _by_kernels(group: Group, labels: list[str], calls: list[Call]) -> list[Tensor]:
    words = [_kernels().pack_moments(call.input.detach(), call.eps) for call in calls]
    gathered = gather(_joined(words), group, " and ".join(labels))
    tensors: list[Tensor | None] = []
    first = 0
    for call, own in zip(calls, words, strict=True):
        buffers = (call.running_mean, call.running_var, call.num_batches_tracked)
        updates = (call.running_var_correction, call.nonfinite_batches, call.update_in_backward)
        of_all = gathered.narrow(1, first, own.numel())
        statistics, count = _kernels().merge_ranks(
            of_all, call.input.size(1), call.own_count(), *buffers, call.momentum, call.eps, *updates
        )
        tensors += [call.input, call.weight, call.bias, call.residual, statistics, count]
        first += own.numel()
    after = [_Settings(label, c.eps, c.activation, c.activation_param) for label, c in zip(labels, calls, strict=True)]
    return list(_Normalize.apply(group, after, *tensors))  # type: ignore[no-untyped-call]


class _Settings(NamedTuple):
    """The settings of a layer that the operators need."""

    label: str
    eps: float
    activation: str
    activation_param: float


_GIVEN, _SAVED = 6, 7  # tensors of a layer that forward receives, and saves
_BY_SIGN = ("relu", "leaky_relu")  # activations whose gradient depends only on the sign of their input


class _Normalize(torch.autograd.Function):
    """Normalization, addition and activation of several layers.

    The tensors are input, weight, bias, residual, statistics and count of each layer. Backward includes the derivatives
    of the statistics, which needs one collective.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, after: list[_Settings], *tensors: Any) -> tuple[Tensor, ...]:
        outputs, saved = [], []
        for i, what in enumerate(after):
            x, weight, bias, residual, statistics, count = tensors[i * _GIVEN : (i + 1) * _GIVEN]
            by_mask = residual is not None and what.activation in _BY_SIGN
            output, mask = _kernels().batch_norm_by_statistics(
                x, statistics, weight, bias, residual, what.activation, what.activation_param, by_mask
            )
            outputs.append(output)
            recomputes = what.activation != "identity" and not by_mask
            saved += [x, weight, *((bias, residual) if recomputes else (None, None))]
            saved += [statistics, count, mask if by_mask else None]
        ctx.save_for_backward(*saved)
        ctx.group, ctx.after = group, after
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_transforms()
        saved = ctx.saved_tensors  # read once: each read runs the unpacking hooks
        layers = []
        for i, (what, grad) in enumerate(zip(ctx.after, grads, strict=True)):
            needs = ctx.needs_input_grad[2 + i * _GIVEN :][:4]
            layers.append(_Layer(what, grad, _Needs(*needs), *saved[i * _SAVED : (i + 1) * _SAVED]))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = [_differentiable_gradients(ctx.group, layer) for layer in layers]
        else:
            results = _gradients(ctx.group, layers)
        return (None, None, *(grad for result in results for grad in (*result, None, None)))


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Needs(NamedTuple):
    """Which gradients are needed."""

    input: bool
    weight: bool
    bias: bool
    residual: bool


class _Layer(NamedTuple):
    """The data of one layer in backward. Bias and residual are present if the gradient of the activation needs them."""

    settings: _Settings
    grad: Tensor
    needs: _Needs
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    statistics: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mask: Tensor | None

    def sums(self) -> Tensor:
        """The gradients of weight and bias for this rank's batch, shape (2, C), in float32 or float64."""
        weight, bias = (p.float() if p is not None and p.itemsize == 2 else p for p in (self.weight, self.bias))
        return torch.stack(self._backward(weight, bias, True, [False, True, True, False], None)[1:3])

    def gradients(self, total: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of input and residual. ``total`` is the sum of :meth:`sums` over all ranks."""
        through = self.needs.residual and self.settings.activation != "identity"
        grad_input, grad_residual = None, self.grad if self.needs.residual else None
        if self.needs.input or through:
            output_mask = [self.needs.input, False, False, through]
            results = self._backward(self.weight, self.bias, total is not None, output_mask, total)
            grad_input = results[0] if self.needs.input else None
            grad_residual = results[3] if through else grad_residual
        return grad_input, grad_residual

    def _backward(
        self, weight: Tensor | None, bias: Tensor | None, training: bool, output_mask: list[bool], total: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        after = (bias, self.residual, self.mask, self.settings.activation, self.settings.activation_param, False)
        of_all = (total, None if total is None else self.count)
        operator = _kernels().batch_norm_backward
        results: tuple[Tensor, Tensor, Tensor, Tensor] = operator(
            self.grad, self.input, weight, self.statistics, training, output_mask, *after, *of_all
        )
        return results


def _gradients(group: Group, layers: list[_Layer]) -> list[Gradients]:
    sums = [layer.sums() if any(layer.needs[:3]) else torch.empty(0) for layer in layers]
    shared = [own for layer, own in zip(layers, sums, strict=True) if layer.needs.input]
    totals: Any = iter(())
    if shared:
        label = " and ".join(layer.settings.label for layer in layers if layer.needs.input)
        if rank_consistency.is_enabled():
            rank_consistency.check_all(group, f"backward of {label}")
        joined = _sum(_joined([own.flatten() for own in shared]), group, label)
        totals = iter(torch.split(joined, [own.numel() for own in shared]))
    results: list[Gradients] = []
    for layer, own in zip(layers, sums, strict=True):
        grad_input, grad_residual = layer.gradients(next(totals).view_as(own) if layer.needs.input else None)
        grad_weight, grad_bias = (
            own[k].to(layer.weight.dtype) if needed and layer.weight is not None else None
            for k, needed in enumerate(layer.needs[1:3])
        )
        results.append((grad_input, grad_weight, grad_bias, grad_residual))
    return results


# ---- plain torch: second and higher derivatives, and the fallback ----------------------------------------------------


def _all_sum(group: Group, label: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: _AllSum.apply(tensor, group, label)  # type: ignore[no-untyped-call]


def _by_reference(group: Group, labels: list[str], calls: list[Call]) -> list[Tensor]:
    return [run_by_reference(call, _all_sum(group, label)) for label, call in zip(labels, calls, strict=True)]


def _differentiable_gradients(group: Group, layer: _Layer) -> Gradients:
    """The gradients of :func:`_gradients`, computed by differentiable operations."""
    grad, (label, eps, activation, parameter) = layer.grad, layer.settings
    if layer.mask is not None:
        below = parameter if activation == "leaky_relu" else 0.0
        grad, activation = torch.where(_above_zero(layer.mask, layer.input), grad, grad * below), "identity"
    bias = layer.bias
    if bias is None and layer.needs.bias:  # its value does not matter: the gradient of an addend does not depend on it
        assert layer.weight is not None
        bias = torch.zeros_like(layer.weight, requires_grad=True)
    added = layer.needs.residual and layer.residual is None
    needs = layer.needs._replace(residual=layer.needs.residual and not added)
    operands = (layer.input, layer.weight, bias, layer.residual)
    sources = [tensor for tensor, needed in zip(operands, needs, strict=True) if needed and tensor is not None]
    found: Any = iter(())
    if sources:
        output = reference.batch_norm(
            layer.input,
            None,
            None,
            layer.weight,
            bias,
            True,
            eps=eps,
            residual=layer.residual,
            activation=activation,
            activation_param=parameter,
            all_sum=_all_sum(group, label),
        )
        found = iter(torch.autograd.grad(output, sources, grad, create_graph=True))
    grad_input, grad_weight, grad_bias, grad_residual = (next(found) if needed else None for needed in needs)
    return grad_input, grad_weight, grad_bias, grad if added else grad_residual


def _above_zero(mask: Tensor, input: Tensor) -> Tensor:
    """The bits of the mask, which follow the memory of ``input``, as a bool tensor of its shape."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(1).bitwise_right_shift(places) & 1).flatten()[: input.numel()].bool()
    return bits.as_strided(input.shape, as_dense(input).stride())
