"""Layers that normalize over the batches of several processes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from normfused import _torch_private
from normfused.arguments import BatchNormFields
from normfused.batch_norm_base import _ActivationBatchNorm, _SequenceBatchNorm
from normfused.distributed import ddp, rank_consistency
from normfused.distributed.rank_consistency import Group
from normfused.distributed.sync_batch_norm import Call, synchronized
from normfused.functional import run_batch_norm

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SyncBatchNorm", "SyncBatchNormAct"]


class _Synchronized(_SequenceBatchNorm):
    """The common base of :class:`SyncBatchNorm` and :class:`SyncBatchNormAct`."""

    _input_dims = (2, 3, 4, 5)
    path = ""  # in the model, if known; used in errors
    converted_from: type[nn.Module] | None = None  # the class before convert_sync_batchnorm()
    process_group: Any

    def _set_process_group(self, process_group: Any) -> None:
        self.process_group = process_group
        ddp.admit(_Synchronized)
        if rank_consistency.is_enabled():
            rank_consistency.name_layers(_Synchronized)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """The same as :func:`normfused.convert_sync_batchnorm`; torch.nn.SyncBatchNorm has a method of this name."""
        import normfused

        return normfused.convert_sync_batchnorm(module, process_group)

    # A process group is a handle of this process. Copies share it, and it cannot be pickled.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.process_group)] = copied, self.process_group
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__dict__.copy())
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        ddp.admit(_Synchronized)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.process_group is not None:
            warnings.warn(
                f"{_label(self)}: its process group is not pickled; the loaded layer synchronizes over all processes "
                "until its process_group is set",
                stacklevel=2,
            )
            state["process_group"] = None
        return state

    def _batch_norm(self, fields: BatchNormFields) -> Tensor:
        return _batch_norms([(self, Call._make(fields))])[0]

    @staticmethod
    def forward_many(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        """Call several layers with one collective in forward and one in backward, instead of one for each layer.

        For independent layers, such as those of the two branches of a residual block. Running statistics are updated
        as by single calls. Hooks of the layers are not called.

        Args:
            calls: tuples ``(layer, input)`` or ``(layer, input, residual)``; the layers share one process group.

        Returns:
            The output of each layer.

        Raises:
            ValueError: the process groups of the layers differ. Otherwise as a call of each layer.

        Example:
            >>> import torch, normfused
            >>> layers = [normfused.SyncBatchNorm(4).eval(), normfused.SyncBatchNormAct(8).eval()]
            >>> inputs = [torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3)]
            >>> [y.shape[1] for y in normfused.SyncBatchNorm.forward_many(list(zip(layers, inputs)))]
            [4, 8]
        """
        prepared = []
        for layer, input, *residual in calls:
            operands = (input, residual[0] if residual else None, None)
            after = (layer.activation or "identity", layer.activation_param, False)
            prepared.append((layer, Call._make(layer._call(*operands, *after))))
        return _batch_norms(prepared)


class SyncBatchNorm(_Synchronized, nn.SyncBatchNorm):
    """Batch norm over the batches of all processes; a subclass of and drop-in for :class:`torch.nn.SyncBatchNorm`.

    It runs on the CPU (gloo) and on CUDA (nccl), for inputs ``(N, C, ...)`` of 2 to 5 dimensions. The batches of the
    ranks may differ in size, and may be empty.

    In training each rank sends the count, mean and standard deviation of its batch in one collective, and two sums of
    gradients in another collective in backward. In evaluation, frozen, or in a group of one process it computes what
    :class:`normfused.BatchNorm2d` computes, and needs no process group. Statistics and running statistics are bitwise
    identical on all ranks. The gradients of ``weight`` and ``bias`` are those of this rank's batch;
    ``DistributedDataParallel`` averages them. Second and higher derivatives need collectives of their own. So does a
    forward that :func:`torch.utils.checkpoint.checkpoint` recomputes, unless its ``context_fn`` saves
    ``torch.ops._c10d_functional.all_gather_into_tensor.default``.

    ``copy.deepcopy`` keeps the process group, which ``AveragedModel`` relies on. Pickling and ``torch.save`` drop a
    given process group with a warning: the loaded layer synchronizes over all processes until ``process_group`` is set.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            :class:`normfused.BatchNorm1d`.
        process_group: the processes whose batches are normalized together; default all.
        running_var_correction, nonfinite: as in :class:`normfused.BatchNorm1d`; ``"skip"`` refers to the batches of all
            ranks.

    Call:
        ``layer(input, residual=None, mask=None, lengths=None)``, as :class:`normfused.BatchNorm1d`. ``mask`` has the
        shape of ``input`` without the channels; on a rank it may be False everywhere.

    Raises:
        ValueError: on each rank, in training with one value per channel on all ranks together. Otherwise as
            :func:`normfused.functional.batch_norm`.
        RuntimeError: a destroyed process group, or one without this rank; a failed collective, for instance because the
            channels of the ranks differ. The message names the layer.
        NotImplementedError: under :mod:`torch.func` or forward-mode differentiation.

    With ``NORMFUSED_SYNC_DEBUG=1`` in the environment, ranks compare their next step before each collective. Ranks that
    differ raise ``RuntimeError`` with the name of the layer. So does a rank that has waited for another for
    ``NORMFUSED_SYNC_DEBUG_TIMEOUT`` seconds (default 30).

    Example:
        >>> import torch, normfused
        >>> layer = normfused.SyncBatchNorm(3)  # one process: no collective
        >>> layer(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html; Chan, Golub and LeVeque, 1983.
    """

    def __init__(
        self,
        # torch.nn's parameters in torch.nn's order, then keywords
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var_correction: int = 1,
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            running_var_correction=running_var_correction,
            nonfinite=nonfinite,
        )
        self._set_process_group(process_group)


class SyncBatchNormAct(_ActivationBatchNorm, _Synchronized, _torch_private.BatchNormBase):
    """:class:`SyncBatchNorm` with an activation in the same pass over memory.

    Like :class:`normfused.BatchNormAct1d`, it does not derive from torch.nn's class, and reading ``eps`` raises.

    Args:
        num_features, process_group: as in :class:`SyncBatchNorm`.
        activation, activation_param: as in :class:`normfused.BatchNormAct1d`.
        eps, momentum, affine, track_running_stats, device, dtype, bias, running_var_correction, nonfinite: as in
            :class:`SyncBatchNorm`.

    Raises:
        As :class:`SyncBatchNorm`, and ``ValueError`` for an unknown activation or a parameter that it does not have.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.SyncBatchNormAct(3, "silu")
        >>> layer(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def __init__(
        self,
        # torch.nn's parameters in torch.nn's order, after the activation, then keywords
        num_features: int,
        activation: str | None = "relu",
        activation_param: float | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var_correction: int = 1,
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__(
            num_features,
            activation,
            activation_param,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            running_var_correction=running_var_correction,
            nonfinite=nonfinite,
        )
        self._set_process_group(process_group)


def _batch_norms(calls: Sequence[tuple[_Synchronized, Call]]) -> list[Tensor]:
    """The outputs of all calls. Those in training share one collective."""
    if rank_consistency.is_enabled():
        rank_consistency.name_layers(_Synchronized)
    training = [(layer, call) for layer, call in calls if layer.training]
    groups = [layer.process_group for layer, _ in training]
    if any(group is not groups[0] for group in groups):
        count = len({id(group) for group in groups})
        raise ValueError(f"SyncBatchNorm.forward_many: calls needs layers of one process group, got {count} groups")
    labels = [_label(layer) for layer, _ in training]
    group = group_of(groups[0], " and ".join(labels)) if training else None
    if group is None:
        return [run_batch_norm(call) for _, call in calls]
    for (layer, call), label in zip(training, labels, strict=True):
        call.check()
        kind = "float64" if call.input.dtype == torch.float64 else "float32"
        rank_consistency.check_once(group, layer, f"{label} ({call.input.size(1)} channels, statistics in {kind})")
    outputs = iter(synchronized(group, labels, [call for _, call in training]))
    return [next(outputs) if layer.training else run_batch_norm(call) for layer, call in calls]


def _label(layer: _Synchronized) -> str:
    return f"SyncBatchNorm({layer.num_features}){' ' + layer.path if layer.path else ''}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def group_of(process_group: Any, label: str) -> Group | None:
    """The process group, default all processes; ``None`` if it has one member or torch.distributed is not in use.

    Raises:
        RuntimeError: the group is destroyed, or this process is not in it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = distributed.group.WORLD if process_group is None else process_group
    try:
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{label}: its process group is destroyed: {error}") from error
    if rank < 0:
        raise RuntimeError(f"{label}: this process is not in its process group")
    return Group(group.group_name, size, rank) if size > 1 else None
