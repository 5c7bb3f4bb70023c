"""Batch norm layers that stand where torch.nn's stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx, nn

from normfused.functional import named_batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

if TYPE_CHECKING:
    _Base = nn.modules.batchnorm._BatchNorm
else:
    _Base = object


class _BatchNorm(_Base):
    """The forward pass; construction, parameters, buffers and state are those of the torch.nn class mixed in."""

    _ranks: ClassVar[tuple[int, ...]]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            leaf = _traced_as_leaf(self, input)
            if leaf is not None:
                return leaf
        # Which statistics normalize, and which buffers are updated, is torch.nn's truth table.
        running_mean, running_var = self.running_mean, self.running_var  # once: nn.Module takes 0.7 us to find each
        training = self.training or (running_mean is None and running_var is None)
        buffered = not self.training or self.track_running_stats
        counter = self.num_batches_tracked if self.training and self.track_running_stats else None
        return named_batch_norm(
            type(self).__name__,
            self._ranks,
            input,
            running_mean if buffered else None,
            running_var if buffered else None,
            self.weight,
            self.bias,
            training,
            # A cumulative average without a counter stands still, as torch.nn's does.
            0.0 if self.momentum is None and counter is None else self.momentum,
            self.eps,
            counter,
        )


def _traced_as_leaf(module: nn.Module, input: fx.Proxy) -> Any:
    """Return the call of `module` as one node, as torch.fx traces torch.nn's layers: it follows train() and eval().

    None where `module` is itself what is traced.
    """
    if not isinstance(input.tracer, fx.Tracer):
        return None
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, (input,), {}) if path else None


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch norm over ``(N, C)`` or ``(N, C, L)``; drop-in for :class:`torch.nn.BatchNorm1d`, which it subclasses.

    Arguments, parameters, buffers and ``state_dict`` are torch.nn's. The arithmetic, what is updated and what raises:
    :func:`normfused.functional.batch_norm`. Running statistics and ``num_batches_tracked`` are updated in place by each
    training forward, inside the one operator.

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm over ``(N, C, H, W)``; drop-in for :class:`torch.nn.BatchNorm2d`, which it subclasses.

    Otherwise as :class:`BatchNorm1d`.
    """

    _ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch norm over ``(N, C, D, H, W)``; drop-in for :class:`torch.nn.BatchNorm3d`, which it subclasses.

    Otherwise as :class:`BatchNorm1d`.
    """

    _ranks = (5,)
