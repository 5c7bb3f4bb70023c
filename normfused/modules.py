"""The layers: drop-in replacements for torch.nn's, and batch norm layers with an activation."""

from __future__ import annotations

from torch import Tensor, nn

from normfused._torch_private import BatchNormBase
from normfused.batch_norm_base import (
    _ActivationBatchNorm,
    _BatchNorm,
    _LazyBatchNorm,
    _SequenceBatchNorm,
    no_stats_update,
)
from normfused.functional import local_response_norm
from normfused.scripting import scriptable

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LocalResponseNorm",
    "no_stats_update",
]


class BatchNorm1d(_SequenceBatchNorm, nn.BatchNorm1d):
    """Batch norm over ``(N, C)`` or ``(N, C, L)``; a subclass of and drop-in for :class:`torch.nn.BatchNorm1d`.

    Arguments, parameters, buffers and ``state_dict`` are those of torch.nn. The arithmetic is that of
    :func:`normfused.functional.batch_norm`. For an activation in the same pass over memory see :class:`BatchNormAct1d`.

    Each training forward updates ``running_mean``, ``running_var`` and ``num_batches_tracked`` in place, as part of the
    one operator. It does not inside :func:`normfused.no_stats_update`, and updates once if checkpointing runs a forward
    twice. CUDA graphs replay the updates of the forward that they captured.

    Args:
        num_features: number of channels ``C``.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics; ``None`` for a cumulative average.
        affine: whether the layer has ``weight`` and ``bias``, of shape ``(C,)``.
        track_running_stats: whether the layer has running statistics. Without them evaluation uses the batch's.
        device, dtype: of parameters and buffers; default torch's.
        bias: whether the layer has ``bias`` if ``affine``.
        running_var_correction: 1 updates ``running_var`` with the unbiased variance, as torch does; 0 with the biased
            one, which makes evaluation equal training at ``momentum=1``.
        nonfinite: ``"propagate"``, as torch; or ``"skip"``: a channel whose batch has an infinity or NaN does not
            update its running statistics, and is counted in the buffer ``nonfinite_batches``, int64 of shape ``(C,)``.
            The buffer is not part of ``state_dict``, and is set to 0 when running statistics are reset or loaded.
        inplace: write the output over the input, and save no other activation for backward. For the requirements on
            the input see :func:`normfused.functional.batch_norm`.

    Call:
        ``layer(input, residual=None, mask=None, lengths=None)``

        input: shape ``(N, C)`` or ``(N, C, L)``, float32, float64, float16 or bfloat16.
        residual: same shape as ``input``, added to the result.
        mask: bool, shape ``(N,)`` or ``(N, L)``: True at the positions that are present.
        lengths: integers, shape ``(N,)``, from 0 to ``L``, on the CPU or the device of ``input``: the number of
            positions that are present in each sequence. Excludes ``mask``.

    Raises:
        ValueError: an option that is not listed; in a call, lengths out of range (``RuntimeError`` in compiled code, a
            failed assertion on CUDA), and the cases of :func:`normfused.functional.batch_norm`.
        AttributeError: on reading ``eps`` of a layer that is frozen, or whose ``running_var_correction`` or
            ``nonfinite`` is not the default. Code that rebuilds or folds a layer by its attributes would lose these
            options without an error. ``layer.epsilon`` is always readable.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.BatchNorm1d(4)
        >>> layer(torch.randn(2, 4, 10), lengths=torch.tensor([10, 6])).shape
        torch.Size([2, 4, 10])

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """

    _input_dims = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm over ``(N, C, H, W)``; a subclass of and drop-in for :class:`torch.nn.BatchNorm2d`.

    Arguments, updates and errors are those of :class:`BatchNorm1d`.

    Call:
        ``layer(input, residual=None, mask=None)`` with ``mask`` of shape ``(N, H, W)``.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.BatchNorm2d(3)
        >>> y = layer(torch.randn(2, 3, 8, 8))
        >>> y.shape, int(layer.num_batches_tracked)
        (torch.Size([2, 3, 8, 8]), 1)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    _input_dims = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch norm over ``(N, C, D, H, W)``; a subclass of and drop-in for :class:`torch.nn.BatchNorm3d`.

    Arguments, updates and errors are those of :class:`BatchNorm1d`.

    Call:
        ``layer(input, residual=None, mask=None)`` with ``mask`` of shape ``(N, D, H, W)``.

    Example:
        >>> import torch, normfused
        >>> normfused.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm3d.html
    """

    _input_dims = (5,)


class BatchNormAct1d(_ActivationBatchNorm, _SequenceBatchNorm, BatchNormBase):
    """``activation(batch_norm(input) + residual)`` in one pass over memory, for ``(N, C)`` or ``(N, C, L)``.

    Parameters, buffers and ``state_dict`` are those of :class:`BatchNorm1d`. The class does not derive from
    :class:`torch.nn.BatchNorm1d`, because code that folds, quantizes or replaces such layers would lose the activation.

    Args:
        num_features: number of channels ``C``.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``,
            ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, or ``"identity"``; ``None`` means ``"identity"``.
        activation_param: negative slope of leaky ReLU (default 0.01) or alpha of ELU (default 1).
        inplace: as in :class:`BatchNorm1d`; for ``"identity"`` and for leaky ReLU with a positive slope.
        eps, momentum, affine, track_running_stats, device, dtype, bias, running_var_correction, nonfinite: as in
            :class:`BatchNorm1d`.

    Call:
        ``layer(input, residual=None, mask=None, lengths=None)``, as :class:`BatchNorm1d`.

    Raises:
        ValueError: an unknown activation; ``activation_param`` for an activation without a parameter; ``inplace`` for
            an activation that cannot be inverted; and the cases of :class:`BatchNorm1d`.
        AttributeError: on reading ``eps``, for the reason given in :class:`BatchNorm1d`; read ``layer.epsilon``.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.BatchNormAct1d(4, "leaky_relu", 0.1)
        >>> layer(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    _input_dims = (2, 3)
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchNormAct2d(_ActivationBatchNorm, BatchNormBase):
    """``activation(batch_norm(input) + residual)`` in one pass over memory, for ``(N, C, H, W)``.

    Arguments and errors are those of :class:`BatchNormAct1d`; parameters and buffers those of :class:`BatchNorm2d`.

    Call:
        ``layer(input, residual=None, mask=None)`` with ``mask`` of shape ``(N, H, W)``.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.BatchNormAct2d(3)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> bool((layer(x, x) >= 0).all())
        True
    """

    _input_dims = (4,)
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchNormAct3d(_ActivationBatchNorm, BatchNormBase):
    """``activation(batch_norm(input) + residual)`` in one pass over memory, for ``(N, C, D, H, W)``.

    Arguments and errors are those of :class:`BatchNormAct1d`; parameters and buffers those of :class:`BatchNorm3d`.

    Call:
        ``layer(input, residual=None, mask=None)`` with ``mask`` of shape ``(N, D, H, W)``.

    Example:
        >>> import torch, normfused
        >>> normfused.BatchNormAct3d(3, "silu")(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _input_dims = (5,)
    _check_input_dim = nn.BatchNorm3d._check_input_dim


class LazyBatchNorm1d(_LazyBatchNorm, _SequenceBatchNorm, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that infers ``num_features`` from its first input.

    Drop-in for :class:`torch.nn.LazyBatchNorm1d`. At the first call its class becomes :class:`BatchNorm1d`. Arguments
    are those of :class:`BatchNorm1d` without ``num_features``.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.LazyBatchNorm1d()
        >>> _ = layer(torch.randn(8, 4))
        >>> layer.num_features, type(layer).__name__
        (4, 'BatchNorm1d')

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyBatchNorm1d.html
    """

    _input_dims = BatchNorm1d._input_dims
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that infers ``num_features`` from its first input.

    Drop-in for :class:`torch.nn.LazyBatchNorm2d`. At the first call its class becomes :class:`BatchNorm2d`. Arguments
    are those of :class:`BatchNorm1d` without ``num_features``.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.LazyBatchNorm2d(momentum=None)
        >>> _ = layer(torch.randn(2, 3, 8, 8))
        >>> layer.num_features
        3

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyBatchNorm2d.html
    """

    _input_dims = BatchNorm2d._input_dims
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that infers ``num_features`` from its first input.

    Drop-in for :class:`torch.nn.LazyBatchNorm3d`. At the first call its class becomes :class:`BatchNorm3d`. Arguments
    are those of :class:`BatchNorm1d` without ``num_features``.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.LazyBatchNorm3d()
        >>> _ = layer(torch.randn(2, 3, 4, 4, 4))
        >>> layer.num_features
        3

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyBatchNorm3d.html
    """

    _input_dims = BatchNorm3d._input_dims
    cls_to_become = BatchNorm3d


class LocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalization over ``(N, C, ...)``; a subclass of and drop-in for torch.nn's class.

    It has no parameters. The arithmetic and the errors of a call are those of
    :func:`normfused.functional.local_response_norm`.

    Args:
        size: number of channels in the window.
        alpha: factor of the mean of squares, default 1e-4.
        beta: exponent, default 0.75.
        k: additive constant, default 1.

    Example:
        >>> import torch, normfused
        >>> normfused.LocalResponseNorm(5)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])

    Source: Krizhevsky, Sutskever and Hinton, 2012, "ImageNet Classification with Deep Convolutional Neural Networks";
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LocalResponseNorm.html
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__(size, alpha, beta, k)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, ...)``; see the class."""
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def __prepare_scriptable__(self) -> nn.Module:
        """The torch.nn layer that ``torch.jit.script`` compiles in place of this one."""
        return scriptable(self, {})
