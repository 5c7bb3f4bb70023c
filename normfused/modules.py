"""Layers that stand where torch.nn's stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from normfused.functional import INTEGERS, check_activation, check_undoable, local_response_norm, named_batch_norm
from normfused.reference import ACTIVATION_PARAMS, is_in_backward

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LocalResponseNorm", "no_stats_update"]

if TYPE_CHECKING:
    from typing_extensions import Self

    _Base = nn.modules.batchnorm._BatchNorm
else:
    _Base = object

_stats_update = True


@contextmanager
def no_stats_update() -> Iterator[None]:
    """Leave running statistics and counters alone: training forwards inside use the batch's own and update nothing.

    For warm-ups, probes and second passes over a batch. It holds for the whole process, not for one thread. A forward
    that is run again during a backward pass, as by :func:`torch.utils.checkpoint.checkpoint`, updates nothing either,
    in eager and in compiled code; unless its first pass ran without gradients and with ``track_running_stats=False``,
    as checkpoint wrappers do that leave the update to the second pass. Either way there is one update.
    """
    global _stats_update
    before, _stats_update = _stats_update, False
    try:
        yield
    finally:
        _stats_update = before


class _BatchNorm(_Base):
    """The forward pass and what we add; parameters, buffers and state are those of the torch.nn class mixed in."""

    _ranks: ClassVar[tuple[int, ...]]

    # Defaults at the class, so that a torch.nn layer can become one of ours by its class alone.
    activation: str | None = None
    activation_param: float | None = None
    running_var_correction: int = 1
    nonfinite: str = "propagate"
    inplace: bool = False
    frozen: bool = False
    _deferred_updates: int = 0  # updates that recomputations are to make, see _update_in_backward()
    nonfinite_batches: Tensor  # where nonfinite is "skip"

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        activation_param: float | None = None,
        running_var_correction: int = 1,
        nonfinite: str = "propagate",
        inplace: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        if activation is not None:
            check_activation(name, activation, 0.0 if activation_param is None else activation_param)
            self.activation = activation
        if activation_param is not None:
            if activation not in ACTIVATION_PARAMS:
                raise ValueError(
                    f"{name}: activation_param is for {' and '.join(ACTIVATION_PARAMS)}, got it for {activation!r}"
                )
            self.activation_param = activation_param
        if running_var_correction not in (0, 1):
            raise ValueError(f"{name}: running_var_correction must be 0 or 1, got {running_var_correction!r}")
        if running_var_correction != 1:
            self.running_var_correction = running_var_correction
        if nonfinite not in ("propagate", "skip"):
            raise ValueError(f"{name}: nonfinite must be 'propagate' or 'skip', got {nonfinite!r}")
        if inplace:
            check_undoable(
                name,
                activation,
                ACTIVATION_PARAMS.get(activation or "", 0.0) if activation_param is None else activation_param,
            )
            self.inplace = inplace
        if nonfinite == "skip":
            if not self.track_running_stats:
                raise ValueError(f"{name}: nonfinite='skip' needs track_running_stats=True")
            self.nonfinite = nonfinite
            assert self.running_mean is not None
            counts = torch.zeros(self.num_features, dtype=torch.int64, device=self.running_mean.device)
            # Not in state_dict, which stays torch.nn's.
            self.register_buffer("nonfinite_batches", counts, persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            leaf = _traced_as_leaf(self, input, residual, mask)
            if leaf is not None:
                return leaf
        after = (self.activation or "identity", self.activation_param, self.inplace)
        return self._batch_norm(*self._arguments(input, residual, mask, *after))

    _batch_norm = staticmethod(named_batch_norm)

    def _arguments(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
        activation_param: float | None,
        inplace: bool,
    ) -> tuple[Any, ...]:
        """Those of :func:`named_batch_norm`, for a call with an activation and a place other than the layer's own."""
        # Which statistics normalize, and which buffers are updated, is torch.nn's truth table.
        running_mean, running_var = self.running_mean, self.running_var  # once: nn.Module takes 0.7 us to find each
        training = self.training or (running_mean is None and running_var is None)
        updates = self.training and self.track_running_stats and _stats_update
        buffered = updates or not self.training
        counter = self.num_batches_tracked if updates else None
        return (
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
            residual,
            activation,
            ACTIVATION_PARAMS.get(activation, 0.0) if activation_param is None else activation_param,
            mask,
            self.running_var_correction,
            self.nonfinite_batches if updates and self.nonfinite == "skip" else None,
            inplace,
            self.training and self._update_in_backward(updates),
        )

    def _update_in_backward(self, updates: bool) -> bool:
        """Whether a training forward is to update running statistics although it runs inside a backward pass.

        Such a forward is a recomputation by checkpointing, whose first pass has updated them already. But some
        checkpoint wrappers turn ``track_running_stats`` off in the first pass, which runs without gradients, and leave
        the update to the recomputation. Each such pass is counted, and lets one recomputation update.
        """
        if not updates:
            may_be_first = _stats_update and self.running_mean is not None and not torch.is_grad_enabled()
            if may_be_first and not is_in_backward():
                self._deferred_updates += 1
            return False
        if not self._deferred_updates:
            return False
        # Outside of a backward pass the update is made anyway, and what was counted before was no such wrapper's.
        # Compiled code cannot know where it will run, and is assumed to be a recomputation.
        recomputes = is_in_backward() or torch.compiler.is_compiling()
        self._deferred_updates = self._deferred_updates - 1 if recomputes else 0
        return True

    def reset_running_stats(self) -> None:
        """Set running statistics and counters to their initial values."""
        super().reset_running_stats()
        if "nonfinite_batches" in self._buffers:  # not yet while torch.nn's constructor runs
            self._restart_nonfinite_batches()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        # The counter is of the running statistics that are replaced. On the meta device or after to_empty() it has no
        # values, and state_dict has none for it.
        if f"{prefix}running_mean" in state_dict and "nonfinite_batches" in self._buffers:
            self._restart_nonfinite_batches()

    def _restart_nonfinite_batches(self) -> None:
        if self.running_mean is not None and self.running_mean.device != self.nonfinite_batches.device:
            self.nonfinite_batches = torch.empty_like(self.nonfinite_batches, device=self.running_mean.device)
        self.nonfinite_batches.zero_()

    def freeze(self) -> Self:
        """Normalize with the running statistics from now on, whatever :meth:`train` says, and update nothing.

        ``weight`` and ``bias`` still learn; with ``requires_grad_(False)`` the layer is one pass over memory each way
        and keeps no activation for backward. Not part of ``state_dict``.

        Raises:
            ValueError: there are no running statistics.
        """
        if self.running_mean is None:
            raise ValueError(f"{type(self).__name__}: there are no running statistics to freeze")
        self.frozen = True
        return self.train(False)

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`: the layer is in training mode, and follows :meth:`train` again."""
        self.frozen = False
        return self.train(True)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    @property
    def qconfig(self) -> Any:
        """What torch.ao.quantization sets. torch's converters ask for it, and would then drop what only we can do."""
        if "qconfig" in self.__dict__:
            return self.__dict__["qconfig"]
        options = own_options(self)
        if options:
            told = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise TypeError(
                f"{type(self).__name__}: torch's converters would drop {told}; "
                "normfused.convert_sync_batchnorm keeps it, and normfused.fold_bn folds it into a convolution"
            )
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    def extra_repr(self) -> str:
        ours = [f"{name}={value!r}" for name, value in own_options(self).items()]
        return ", ".join([str(super().extra_repr()), *ours])  # type: ignore[no-untyped-call]


def own_options(layer: nn.Module) -> dict[str, Any]:
    """What one of our layers has been told that torch.nn's layers cannot be."""
    names = ("activation", "activation_param", "running_var_correction", "nonfinite", "inplace", "frozen")
    options = {name: getattr(layer, name) for name in names}
    return {name: value for name, value in options.items() if value != getattr(_BatchNorm, name)}


def _traced_as_leaf(module: nn.Module, input: fx.Proxy, *others: Any) -> Any:
    """Return the call of `module` as one node, as torch.fx traces torch.nn's layers: it follows train() and eval().

    None where `module` is itself what is traced.
    """
    if not isinstance(input.tracer, fx.Tracer):
        return None
    path = input.tracer.path_of_module(module)
    while others and others[-1] is None:
        others = others[:-1]
    return input.tracer.create_proxy("call_module", path, (input, *others), {}) if path else None


class _OfSequences(_BatchNorm):
    """Layers that take sequences too, of which ``lengths`` says what ``mask`` says."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalize ``input``; see the class."""
        if lengths is not None:
            mask = self._mask_of(input, mask, lengths)
        return super().forward(input, residual, mask)

    def _mask_of(self, input: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        name = type(self).__name__
        if mask is not None:
            raise ValueError(f"{name}: mask and lengths say the same, got both")
        if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"{name}: lengths must be an integer tensor, got {got}")
        if input.dim() != 3 or lengths.shape != input.shape[:1]:
            raise ValueError(
                f"{name}: lengths must have shape (N,) for an input of shape (N, C, L), "
                f"got {tuple(lengths.shape)} for {tuple(input.shape)}"
            )
        if lengths.device not in (input.device, torch.device("cpu")):
            raise ValueError(f"{name}: lengths is on {lengths.device}, but input is on {input.device}")
        fits = ((lengths >= 0) & (lengths <= input.size(2))).all()
        message = f"{name}: lengths must be from 0 to {input.size(2)}, the length of input"
        if torch.compiler.is_compiling() or lengths.device.type != "cpu":
            torch._assert_async(fits, message)  # without waiting for the device
        elif not fits:
            raise ValueError(f"{message}, got {lengths.tolist()}")
        return torch.arange(input.size(2), device=input.device) < lengths.to(input.device).unsqueeze(1)


class BatchNorm1d(_OfSequences, nn.BatchNorm1d):
    """Batch norm over ``(N, C)`` or ``(N, C, L)``; drop-in for :class:`torch.nn.BatchNorm1d`, which it subclasses.

    Arguments, parameters, buffers and ``state_dict`` are torch.nn's. The arithmetic, what is updated and what raises:
    :func:`normfused.functional.batch_norm`. Running statistics and ``num_batches_tracked`` are updated in place by each
    training forward, inside the one operator; not inside :func:`normfused.no_stats_update`, and once where
    checkpointing runs a forward twice. (CUDA graphs replay the updates of the forward that they captured.)

    Args:
        activation, activation_param: what follows the normalization, in the same pass over memory.
        running_var_correction: 1 as torch; 0 makes evaluation equal training at ``momentum=1``.
        nonfinite: ``"propagate"`` as torch; ``"skip"``: a channel in whose batch there is an infinity or a NaN leaves
            its running statistics as they are, and is counted in the buffer ``nonfinite_batches``, int64 of shape
            ``(C,)``, which is not part of ``state_dict``: it restarts at 0 where running statistics are reset or
            loaded.
        inplace: write the output over the input, and keep no other activation for backward; for no activation or a
            leaky ReLU. What this asks of the input: :func:`normfused.functional.batch_norm`.

    Called with ``(input, residual=None, mask=None, lengths=None)``: ``residual`` is added before the activation;
    ``mask``, bool of shape ``(N,)`` or ``(N, L)``, names the positions that are present; ``lengths``, integers of shape
    ``(N,)`` from 0 to ``L`` on the CPU or ``input``'s device, says the same of sequences by how long they are. Lengths
    out of this range raise ``ValueError`` on the CPU, ``RuntimeError`` in compiled code, and fail an assertion on CUDA.

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm over ``(N, C, H, W)``; drop-in for :class:`torch.nn.BatchNorm2d`, which it subclasses.

    Called with ``(input, residual=None, mask=None)``, ``mask`` of shape ``(N, H, W)``. Otherwise as
    :class:`BatchNorm1d`.
    """

    _ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch norm over ``(N, C, D, H, W)``; drop-in for :class:`torch.nn.BatchNorm3d`, which it subclasses.

    Called with ``(input, residual=None, mask=None)``, ``mask`` of shape ``(N, D, H, W)``. Otherwise as
    :class:`BatchNorm1d`.
    """

    _ranks = (5,)


class LocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalization over ``(N, C, ...)``; drop-in for :class:`torch.nn.LocalResponseNorm`.

    Arguments and attributes are those of torch.nn's class, which it subclasses; there are no parameters. The
    arithmetic, and what raises: :func:`normfused.functional.local_response_norm`.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LocalResponseNorm.html
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``."""
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)
