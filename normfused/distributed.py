"""Batch norm over the batches of several processes, and their running statistics brought together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from normfused import agreement
from normfused.agreement import Group
from normfused.arguments import BatchNormFields
from normfused.checks import check_group
from normfused.functional import run_batch_norm
from normfused.modules import _OfSequences, _WithActivation
from normfused.sync_batch_norm import Call, gather, synchronized

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SyncBatchNorm", "SyncBatchNormAct", "sync_running_stats"]


class _Synchronized(_OfSequences):
    """What :class:`SyncBatchNorm` and :class:`SyncBatchNormAct` have in common."""

    _ranks = (2, 3, 4, 5)
    path = ""  # in the model, where it is known
    converted_from: type[nn.Module] | None = None  # by convert_sync_batchnorm()
    process_group: Any

    def _set_process_group(self, process_group: Any) -> None:
        self.process_group = process_group
        if agreement.debugs():
            agreement.name_layers(_Synchronized)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """:func:`normfused.convert_sync_batchnorm`, at the place where :class:`torch.nn.SyncBatchNorm` has its own."""
        import normfused

        return normfused.convert_sync_batchnorm(module, process_group)

    # A process group is a handle of this process: copies share it, and it cannot be pickled.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.process_group)] = copied, self.process_group
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return copied

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__dict__.copy())  # type: ignore[no-untyped-call]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.process_group is not None:
            warnings.warn(
                f"{_label(self)}: its process group is not pickled; what is loaded synchronizes over all processes "
                "until its process_group is set",
                stacklevel=2,
            )
            state["process_group"] = None
        return state

    def _batch_norm(self, fields: BatchNormFields) -> Tensor:
        return _batch_norms([(self, Call._make(fields))])[0]

    @staticmethod
    def together(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        """The outputs of several layers of one process group, by one collective each way instead of one for each.

        For layers of which none waits for another, such as those of a residual block's two branches.

        Args:
            calls: ``(layer, input)`` or ``(layer, input, residual)`` for each. Hooks of the layers are not called.

        Raises:
            ValueError: the layers' process groups differ. Otherwise as a call of each.
        """
        prepared = []
        for layer, input, *residual in calls:
            operands = (input, residual[0] if residual else None, None)
            after = (layer.activation or "identity", layer.activation_param, False)
            prepared.append((layer, Call._make(layer._call(*operands, *after))))
        return _batch_norms(prepared)


class SyncBatchNorm(_Synchronized, nn.SyncBatchNorm):
    """Batch norm over the batches of all processes together; drop-in for :class:`torch.nn.SyncBatchNorm`.

    It runs on the CPU (gloo) as on CUDA (nccl), for ``(N, C, ...)`` of 2 to 5 dimensions, with shares of any size, the
    empty one included. In training each rank sends the count, mean and standard deviation of its share, in one
    collective, and in backward the sums of two gradients in another. In evaluation, frozen, or in a group of one
    process it does what :class:`normfused.BatchNorm2d` does, and needs no process group. Statistics and running
    statistics are bitwise identical on every rank. The gradients of ``weight`` and ``bias`` are those of this rank's
    share, which ``DistributedDataParallel`` averages. Derivatives after the first take collectives of their own. So
    does a forward that :func:`torch.utils.checkpoint.checkpoint` runs again, unless its ``context_fn`` saves
    ``torch.ops._c10d_functional.all_gather_into_tensor.default``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias: torch.nn's.
        running_var_correction, nonfinite: as for :class:`normfused.BatchNorm1d`;
            ``"skip"`` looks at the statistics of all ranks together.

    Called with ``(input, residual=None, mask=None, lengths=None)``, as :class:`normfused.BatchNorm1d`; ``mask`` is of
    ``input``'s shape without the channels, and a rank may have no position that is present.

    ``copy.deepcopy`` keeps the process group, as ``AveragedModel`` needs it. Pickling and ``torch.save`` of the module
    drop an explicit one with a warning: what is loaded synchronizes over all processes until ``process_group`` is set.

    Raises:
        ValueError: in training one value a channel on all ranks together, on each of
            them. What else a call raises: :func:`normfused.functional.batch_norm`.
        RuntimeError: a process group that is gone, or that this rank is not in; an exchange that fails, as it does
            where the ranks' channels differ. The text names the layer.
        NotImplementedError: under :mod:`torch.func` or forward-mode differentiation.

    With ``NORMFUSED_SYNC_DEBUG=1`` in the environment ranks compare what they are about to do before each collective.
    Those that differ raise, with the layer's name, and so does one that has waited ``NORMFUSED_SYNC_DEBUG_TIMEOUT``
    seconds for another (default 30).

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html; Chan, Golub and LeVeque, 1983.
    """

    def __init__(
        self,
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


class SyncBatchNormAct(_WithActivation, _Synchronized, nn.modules.batchnorm._BatchNorm):
    """:class:`SyncBatchNorm` with an activation in the same pass over memory.

    No subclass of :class:`torch.nn.SyncBatchNorm`; why, and ``activation``, ``activation_param`` and ``eps``:
    :class:`normfused.BatchNormAct1d`. Otherwise as :class:`SyncBatchNorm`.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def __init__(
        self,
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
    """The outputs of all calls; those in training share one collective."""
    if agreement.debugs():
        agreement.name_layers(_Synchronized)
    training = [(layer, call) for layer, call in calls if layer.training]
    groups = [layer.process_group for layer, _ in training]
    if any(group is not groups[0] for group in groups):
        raise ValueError("SyncBatchNorm: layers of different process groups cannot be taken together")
    labels = [_label(layer) for layer, _ in training]
    group = _group_of(groups[0], " and ".join(labels)) if training else None
    if group is None:
        return [run_batch_norm(call) for _, call in calls]
    for (layer, call), label in zip(training, labels, strict=True):
        call.check()
        kind = "float64" if call.input.dtype == torch.float64 else "float32"
        agreement.meet(group, layer, f"{label} ({call.input.size(1)} channels, statistics in {kind})")
    outputs = iter(synchronized(group, labels, [call for _, call in training]))
    return [next(outputs) if layer.training else run_batch_norm(call) for layer, call in calls]


def _label(layer: _Synchronized) -> str:
    return f"SyncBatchNorm({layer.num_features}){' ' + layer.path if layer.path else ''}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _group_of(process_group: Any, label: str) -> Group | None:
    """The group; None where there is nobody to share with."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = distributed.group.WORLD if process_group is None else process_group
    try:
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{label}: its process group is gone: {error}") from error
    if rank < 0:
        raise RuntimeError(f"{label}: this process is not in its process group")
    return Group(group.group_name, size, rank) if size > 1 else None


def sync_running_stats(model: nn.Module, mode: str = "broadcast", process_group: Any = None) -> None:
    """Make the running statistics of all batch norms in ``model`` equal on all ranks, by one collective.

    For models whose batch norms are not synchronized, before evaluation or a checkpoint. All of torch.nn's batch norms
    and ours take part, as do the counters ``num_batches_tracked``, of which the greatest stands.

    Args:
        model: with the same layers on every rank; its buffers are written.
        mode: ``"broadcast"``: those of the group's first rank; ``"mean"``: the mean of running means and of running
            variances; ``"pooled"``: mean and variance of all ranks' data taken together, as many from each: to the mean
            of the variances it adds the variance of the means.
        process_group: default all processes.

    Raises:
        ValueError: no such mode. RuntimeError: ``torch.distributed`` is not initialized, this process is not in the
        group, or the layers differ between ranks.
    """
    modes = ("broadcast", "mean", "pooled")
    if mode not in modes:
        raise ValueError(f"sync_running_stats: mode must be one of {', '.join(modes)}, got {mode!r}")
    check_group("sync_running_stats", process_group)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    buffers = [[getattr(layer, kind) for layer in layers if layer.running_mean is not None] for kind in kinds]
    if not buffers[0]:
        return
    home = buffers[0][0].device
    # Counters are exact in float64 up to 2^53.
    own = torch.cat([buffer.detach().reshape(-1).to(home, torch.float64) for of_kind in buffers for buffer in of_kind])
    channels = sum(buffer.numel() for buffer in buffers[0])
    if mode == "broadcast":
        distributed.broadcast(own, group=process_group, group_src=0)
    else:
        group = _group_of(process_group, "sync_running_stats")
        ranks = own.unsqueeze(0) if group is None else gather(own, group, "sync_running_stats")
        means, variances, counters = torch.split(ranks, [channels, channels, len(buffers[2])], dim=1)
        variance = variances.mean(0)
        if mode == "pooled":
            variance = variance + means.var(0, correction=0)
        own = torch.cat((means.mean(0), variance, counters.amax(0)))
    values = iter(torch.split(own, [buffer.numel() for of_kind in buffers for buffer in of_kind]))
    with torch.no_grad():
        for of_kind in buffers:
            for buffer in of_kind:
                buffer.copy_(next(values).view_as(buffer))


def _admit_to_ddp() -> None:
    """Have ``DistributedDataParallel`` take our layers on the CPU.

    There it refuses whatever is a torch.nn.SyncBatchNorm, because torch's own does not run on it.
    """
    refuse = getattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", None)
    if refuse is None:
        return

    def refuse_others(ddp: DistributedDataParallel, module: nn.Module) -> None:
        others = [layer for layer in module.modules() if not isinstance(layer, _Synchronized)]
        refuse(ddp, SimpleNamespace(modules=lambda: others))

    DistributedDataParallel._passing_sync_batchnorm_handle = refuse_others  # type: ignore[method-assign]


_admit_to_ddp()
