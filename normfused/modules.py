"""Drop-in layers for torch.nn's, and batch norm layers with an activation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from normfused.arguments import BatchNormFields, check_activation, check_invertible
from normfused.functional import INTEGERS, local_response_norm, run_batch_norm
from normfused.reference import ACTIVATION_PARAMS, is_in_backward
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

    # Numbers of dimensions that an input may have; None: a subclass has a _check_input_dim() of its own.
    _ranks: ClassVar[tuple[int, ...] | None]

    # Defaults at the class, so that a torch.nn layer can become one of ours by its class alone.
    activation: str | None = None  # only layers that torch's tools cannot mistake for theirs have one
    activation_param: float | None = None
    running_var_correction: int = 1
    nonfinite: str = "propagate"
    inplace: bool = False
    frozen: bool = False
    _deferred_updates: int = 0  # updates that recomputations are to make, see _update_in_backward()
    nonfinite_batches: Tensor  # where nonfinite is "skip"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if "_ranks" in vars(base):
                break
            if "_check_input_dim" in vars(base):
                cls._ranks = None
                break

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var_correction: int = 1,
        nonfinite: str = "propagate",
        inplace: bool = False,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if not bias:  # which torch.nn's layers have only in newer versions
            factory["bias"] = False
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self._set_options(running_var_correction, nonfinite, inplace)

    def _set_options(self, running_var_correction: int, nonfinite: str, inplace: bool) -> None:
        """Set what differs from the defaults of the class."""
        name = type(self).__name__
        if running_var_correction not in (0, 1):
            raise ValueError(f"{name}: running_var_correction must be 0 or 1, got {running_var_correction!r}")
        if running_var_correction != 1:
            self.running_var_correction = running_var_correction
        if nonfinite not in ("propagate", "skip"):
            raise ValueError(f"{name}: nonfinite must be 'propagate' or 'skip', got {nonfinite!r}")
        if nonfinite == "skip":
            if not self.track_running_stats:
                raise ValueError(f"{name}: nonfinite='skip' needs track_running_stats=True")
            self.nonfinite = nonfinite
            self._register_nonfinite_batches()
        if inplace:
            self.inplace = inplace

    def _register_nonfinite_batches(self) -> None:
        assert self.running_mean is not None
        counts = torch.zeros(self.running_mean.shape, dtype=torch.int64, device=self.running_mean.device)
        # Not in state_dict, which stays torch.nn's.
        self.register_buffer("nonfinite_batches", counts, persistent=False)

    @property
    def epsilon(self) -> float:
        """What is added to the variance: ``eps``, readable whatever the options."""
        return self.__dict__["eps"]  # type: ignore[no-any-return]

    # Code that folds a batch norm or rebuilds it as another layer has to read its eps. It cannot know our options, so
    # it is stopped there. The value lies where torch.nn's layers have it, for copies, pickles and changes of class.
    @property
    def eps(self) -> float:
        if options_to_lose(self):
            raise AttributeError  # after which __getattr__ is called, and says why
        return self.epsilon

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    def __getattr__(self, name: str) -> Any:
        # As nn.Module's, whose call is saved: a forward pass comes here for each parameter and buffer.
        own = self.__dict__
        if "_buffers" in own and name in (held := own["_buffers"]):
            return held[name]
        if "_parameters" in own and name in (held := own["_parameters"]):
            return held[name]
        if name == "eps" and "eps" in own:
            options = ", ".join(f"{option}={value!r}" for option, value in options_to_lose(self).items())
            raise AttributeError(
                f"{type(self).__name__}: eps cannot be read, because code that folds or rebuilds the layer by its "
                f"attributes would lose {options}; use normfused.convert_sync_batchnorm or normfused.fold_bn instead, "
                "or read layer.epsilon"
            )
        return super().__getattr__(name)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            leaf = _traced_as_leaf(self, input, residual, mask)
            if leaf is not None:
                return leaf
        after = (self.activation or "identity", self.activation_param, self.inplace)
        return self._batch_norm(self._call(input, residual, mask, *after))

    _batch_norm = staticmethod(run_batch_norm)

    def _call(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
        activation_param: float | None,
        inplace: bool,
    ) -> BatchNormFields:
        """The layer's call with this activation, in place or not."""
        if self._ranks is None:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        # Which statistics normalize, and which buffers are updated, is torch.nn's truth table.
        running_mean, running_var = self.running_mean, self.running_var  # once: nn.Module takes 0.7 us to find each
        training = self.training or (running_mean is None and running_var is None)
        if running_mean is None and self.frozen:
            raise ValueError(f"{type(self).__name__}: the layer is frozen, but its running statistics are gone")
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
            self.__dict__["eps"],
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
        """Set running statistics and counters to their initial values; those of a frozen layer stay as they are."""
        if not self.frozen:
            self._restart_statistics()

    def reset_parameters(self) -> None:
        """Set parameters, running statistics and counters to what a new layer has."""
        self._restart_statistics()
        super().reset_parameters()

    def _restart_statistics(self) -> None:
        super().reset_running_stats()
        if "nonfinite_batches" in self._buffers:  # not yet while torch.nn's constructor runs
            self._restart_nonfinite_batches()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        # The counter is of the running statistics that are replaced; after to_empty() or on the meta device it is none.
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

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles."""
        return scriptable(self, options_to_lose(self))

    def extra_repr(self) -> str:
        ours = [f"{name}={value!r}" for name, value in own_options(self).items()]
        return ", ".join([str(super().extra_repr()), *ours])  # type: ignore[no-untyped-call]


def own_options(layer: nn.Module) -> dict[str, Any]:
    """What one of our layers has been told that torch.nn's layers cannot be."""
    options = {name: getattr(layer, name) for name in (*_OPTIONS_TO_LOSE, "inplace")}
    return {name: value for name, value in options.items() if value != getattr(_BatchNorm, name)}


# Without one of these a layer gives other results or other running statistics. In place is not among them.
_OPTIONS_TO_LOSE = ("activation", "activation_param", "running_var_correction", "nonfinite", "frozen")


def options_to_lose(layer: nn.Module) -> dict[str, Any]:
    """Those of :func:`own_options` without which the layer would do something else."""
    return {name: value for name, value in own_options(layer).items() if name in _OPTIONS_TO_LOSE}


def as_torchs(layer: nn.Module) -> bool:
    """Change one of our layers to torch.nn's in place, where nothing would be lost. Return whether it was."""
    cls = type(layer)
    stock = cls.__bases__[-1]
    known = cls.__module__.startswith("normfused.") and stock in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not known or options_to_lose(layer):
        return False
    layer.__class__ = stock
    return True


def _traced_as_leaf(module: nn.Module, input: fx.Proxy, *others: Any) -> Any:
    """Return the call of `module` as one node, as torch.fx traces torch.nn's layers: it follows train() and eval().

    None where `module` is itself what is traced.
    """
    if not isinstance(input.tracer, fx.Tracer):
        return None
    path = input.tracer.path_of_module(module)
    while others and others[-1] is None:
        others = others[:-1]
    if not others and any(cls.__module__.startswith("torch.ao.quantization") for cls in type(input.tracer).__mro__):
        as_torchs(module)  # by whose class it is then found
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


class _WithActivation(_BatchNorm):
    """Layers that :class:`torch.nn.BatchNorm2d` is no base of: what looks for that would lose the activation."""

    def __init__(
        self,
        num_features: int,
        activation: str | None = "relu",
        activation_param: float | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var_correction: int = 1,
        nonfinite: str = "propagate",
        inplace: bool = False,
    ) -> None:
        self._check_activation(activation, activation_param, inplace)
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
            inplace=inplace,
        )
        self._set_activation(activation, activation_param)

    def _check_activation(self, activation: str | None, parameter: float | None, inplace: bool) -> None:
        name = type(self).__name__
        kind = "identity" if activation is None else activation
        check_activation(name, kind, 0.0 if parameter is None else parameter)
        if parameter is None:
            parameter = ACTIVATION_PARAMS.get(kind, 0.0)
        elif kind not in ACTIVATION_PARAMS:
            kinds = " and ".join(ACTIVATION_PARAMS)
            raise ValueError(f"{name}: activation_param is for {kinds}, got it for {activation!r}")
        if inplace:
            check_invertible(name, activation, parameter)

    def _set_activation(self, activation: str | None, parameter: float | None) -> None:
        self.activation = None if activation == "identity" else activation
        self.activation_param = parameter


class _Lazy(_BatchNorm):
    """Layers that learn ``num_features`` from their first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var_correction: int = 1,
        nonfinite: str = "propagate",
        inplace: bool = False,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if not bias:
            factory["bias"] = False
        # Past our own, which has another signature.
        lazy: Any = super(_BatchNorm, self)
        lazy.__init__(eps, momentum, affine, track_running_stats, **factory)
        self._set_options(running_var_correction, nonfinite, inplace)

    def _register_nonfinite_batches(self) -> None:
        # Not by num_features, which torch.nn leaves at 0 where a state_dict brings the shapes.
        if self.running_mean is not None and not nn.parameter.is_lazy(self.running_mean):
            super()._register_nonfinite_batches()

    def initialize_parameters(self, input: Tensor) -> None:
        super().initialize_parameters(input)  # type: ignore[misc]
        if self.nonfinite == "skip":
            self._register_nonfinite_batches()


class BatchNorm1d(_OfSequences, nn.BatchNorm1d):
    """Batch norm over ``(N, C)`` or ``(N, C, L)``; drop-in for :class:`torch.nn.BatchNorm1d`, which it subclasses.

    Arguments, parameters, buffers and ``state_dict`` are torch.nn's. The arithmetic, what is updated and what raises:
    :func:`normfused.functional.batch_norm`. Running statistics and ``num_batches_tracked`` are updated in place by each
    training forward, inside the one operator; not inside :func:`normfused.no_stats_update`, and once where
    checkpointing runs a forward twice. (CUDA graphs replay the updates of the forward that they captured.)

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: torch.nn's.
        running_var_correction: 1 as torch; 0 makes evaluation equal training at ``momentum=1``.
        nonfinite: ``"propagate"`` as torch; ``"skip"``: a channel in whose batch there is an infinity or a NaN leaves
            its running statistics as they are, and is counted in the buffer ``nonfinite_batches``, int64 of shape
            ``(C,)``, which is not part of ``state_dict``: it restarts at 0 where running statistics are reset or
            loaded.
        inplace: write the output over the input, and keep no other activation for backward. What this asks of the
            input: :func:`normfused.functional.batch_norm`.

    An activation in the same pass over memory: :class:`BatchNormAct1d`. ``eps`` of a layer that is frozen or has a
    ``running_var_correction`` or ``nonfinite`` other than the default raises ``AttributeError``, which stops code that
    would rebuild or fold the layer without them; ``layer.epsilon`` is always readable.

    Called with ``(input, residual=None, mask=None, lengths=None)``: ``residual`` is added to the result;
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


class BatchNormAct1d(_WithActivation, _OfSequences, nn.modules.batchnorm._BatchNorm):
    """:class:`BatchNorm1d` with an activation in the same pass over memory; parameters and ``state_dict`` are the same.

    ``activation(batch_norm(input) + residual)``. Not a subclass of :class:`torch.nn.BatchNorm1d`, because code that
    folds, quantizes or replaces those layers would lose the activation. Reading ``eps`` raises ``AttributeError`` for
    the same reason; read ``layer.epsilon``.

    Args:
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``,
            ``"silu"``, ``"gelu"``, ``"gelu_tanh"``; ``"identity"`` or ``None`` for none.
        activation_param: leaky ReLU's negative slope (default 0.01), ELU's alpha (default 1).
        inplace: as for :class:`BatchNorm1d`; without an activation or with a leaky ReLU of a positive slope.

    Otherwise as :class:`BatchNorm1d`.

    Raises:
        ValueError: an unknown activation, or a parameter that it does not have.
    """

    _ranks = (2, 3)
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchNormAct2d(_WithActivation, nn.modules.batchnorm._BatchNorm):
    """:class:`BatchNorm2d` with an activation in the same pass over memory, for ``(N, C, H, W)``.

    Called with ``(input, residual=None, mask=None)``. Otherwise as :class:`BatchNormAct1d`.
    """

    _ranks = (4,)
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchNormAct3d(_WithActivation, nn.modules.batchnorm._BatchNorm):
    """:class:`BatchNorm3d` with an activation in the same pass over memory, for ``(N, C, D, H, W)``.

    Called with ``(input, residual=None, mask=None)``. Otherwise as :class:`BatchNormAct1d`.
    """

    _ranks = (5,)
    _check_input_dim = nn.BatchNorm3d._check_input_dim


class LazyBatchNorm1d(_Lazy, _OfSequences, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that learns ``num_features`` from its first input, at which it becomes one.

    Drop-in for :class:`torch.nn.LazyBatchNorm1d`. Arguments: those of :class:`BatchNorm1d` without ``num_features``.
    """

    _ranks = BatchNorm1d._ranks
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that learns ``num_features`` from its first input, at which it becomes one.

    Drop-in for :class:`torch.nn.LazyBatchNorm2d`. Arguments: those of :class:`BatchNorm2d` without ``num_features``.
    """

    _ranks = BatchNorm2d._ranks
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that learns ``num_features`` from its first input, at which it becomes one.

    Drop-in for :class:`torch.nn.LazyBatchNorm3d`. Arguments: those of :class:`BatchNorm3d` without ``num_features``.
    """

    _ranks = BatchNorm3d._ranks
    cls_to_become = BatchNorm3d


class LocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalization over ``(N, C, ...)``; drop-in for :class:`torch.nn.LocalResponseNorm`.

    Arguments and attributes are those of torch.nn's class, which it subclasses; there are no parameters. The
    arithmetic, and what raises: :func:`normfused.functional.local_response_norm`.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LocalResponseNorm.html
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``."""
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles."""
        return scriptable(self, {})
