"""What all batch norm layers share: the forward pass, the options beyond torch.nn's, and the rules for updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from normfused._torch_private import BatchNormBase, assert_async, is_in_backward
from normfused.activations import ACTIVATION_PARAMS
from normfused.arguments import BatchNormFields, check_activation, check_invertible
from normfused.checks import INTEGERS
from normfused.functional import run_batch_norm
from normfused.layer_tensors import RegisteredTensors, buffer_of, parameter_of
from normfused.scripting import scriptable

if TYPE_CHECKING:
    from typing_extensions import Self

    _Base = BatchNormBase
else:
    _Base = object

# One entry for each active no_stats_update(). Threads enter and leave in any order; append() and pop() are atomic.
_suspensions: list[None] = []


@contextmanager
def no_stats_update() -> Iterator[None]:
    """A context in which no layer updates its running statistics and counters.

    Training forwards still normalize with the statistics of the batch. Use it for warm-ups, probes and second passes
    over a batch. It applies to all layers of the package and to the whole process, not to one thread: updates resume
    when no thread is in such a context.

    Activation checkpointing needs no such context: each forward makes one update. A recomputation during a backward
    pass updates nothing, in eager and in compiled code, because the first pass has. The exception is a first pass that
    runs without gradients and with ``track_running_stats=False``. Some checkpoint wrappers leave the update to the
    recomputation that way, which then makes it.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.BatchNorm1d(3)
        >>> with normfused.no_stats_update():
        ...     _ = layer(torch.randn(8, 3))
        >>> int(layer.num_batches_tracked)
        0
    """
    _suspensions.append(None)
    try:
        yield
    finally:
        _suspensions.pop()


class _BatchNorm(RegisteredTensors, _Base):
    """The forward pass and the options of the package.

    Parameters, buffers and ``state_dict`` come from the torch.nn class that a subclass also inherits from.
    """

    # Numbers of dimensions that an input may have. None: a subclass defines its own _check_input_dim().
    _input_dims: ClassVar[tuple[int, ...] | None]

    # Defaults are class attributes, so that assigning __class__ is enough to convert a torch.nn layer.
    activation: str | None = None  # set only in classes that do not derive from torch.nn.BatchNorm1d, 2d and 3d
    activation_param: float | None = None
    running_var_correction: int = 1
    nonfinite: str = "propagate"
    inplace: bool = False
    frozen: bool = False
    _deferred_updates: int = 0  # updates left to recomputations, see _update_in_backward()
    nonfinite_batches: Tensor  # only with nonfinite="skip"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if "_input_dims" in vars(base):
                break
            if "_check_input_dim" in vars(base):
                cls._input_dims = None
                break

    def __init__(
        self,
        # torch.nn's parameters in torch.nn's order, then keywords
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
        if not bias:  # older versions of torch.nn's layers have no such argument
            factory["bias"] = False
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self._set_options(running_var_correction, nonfinite, inplace)

    def _set_options(self, running_var_correction: int, nonfinite: str, inplace: bool) -> None:
        """Check the options, and set those that differ from the defaults of the class."""
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
        # Not persistent: state_dict has exactly the keys of torch.nn's layers.
        self.register_buffer("nonfinite_batches", counts, persistent=False)

    @property
    def epsilon(self) -> float:
        """The value that is added to the variance. Unlike ``eps``, it is readable with all options."""
        return self.__dict__["eps"]  # type: ignore[no-any-return]

    # Code that folds a batch norm into another layer, or rebuilds it, reads eps. It does not know the package's options
    # and would lose them without an error, so reading eps raises. The value is stored in __dict__, as torch.nn's layers
    # store it, so that copies, pickles and changes of class work.
    @property
    def eps(self) -> float:
        if behavioral_options(self):
            raise AttributeError  # Python then calls __getattr__, which raises with the reason
        return self.epsilon

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    def __getattr__(self, name: str) -> Any:
        if name == "eps" and "eps" in self.__dict__:
            options = ", ".join(f"{option}={value!r}" for option, value in behavioral_options(self).items())
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
        """The fields of this layer's call with this activation, in place or not."""
        if self._input_dims is None:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        # Which statistics normalize and which buffers are updated follows torch.nn, for all combinations of training
        # mode, track_running_stats and running statistics that are None.
        running_mean, running_var = buffer_of(self, "running_mean"), buffer_of(self, "running_var")
        training = self.training or (running_mean is None and running_var is None)
        if running_mean is None and self.frozen:
            raise ValueError(f"{type(self).__name__}: the layer is frozen, but its running statistics are gone")
        updates = self.training and self.track_running_stats and not _suspensions
        buffered = updates or not self.training
        counter = buffer_of(self, "num_batches_tracked") if updates else None
        return (
            type(self).__name__,
            self._input_dims,
            input,
            running_mean if buffered else None,
            running_var if buffered else None,
            parameter_of(self, "weight"),
            parameter_of(self, "bias"),
            training,
            # Without a counter a cumulative average does not change, as in torch.nn.
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
        """Whether a training forward updates running statistics if it runs inside a backward pass.

        Such a forward is a recomputation by checkpointing. Normally its first pass has made the update. Some checkpoint
        wrappers turn ``track_running_stats`` off in the first pass, which runs without gradients, and leave the update
        to the recomputation. Each such first pass is counted, and allows one recomputation to update.
        """
        if not updates:
            may_be_first = not _suspensions and self.running_mean is not None and not torch.is_grad_enabled()
            if may_be_first and not is_in_backward():
                self._deferred_updates += 1
            return False
        if not self._deferred_updates:
            return False
        # A forward outside of a backward pass updates anyway, and shows that the counted passes were no checkpoint's.
        # Where compiled code will run is unknown while it is compiled; it is assumed to be a recomputation.
        recomputes = is_in_backward() or torch.compiler.is_compiling()
        self._deferred_updates = self._deferred_updates - 1 if recomputes else 0
        return True

    def reset_running_stats(self) -> None:
        """Set running statistics and counters to their initial values, in place. No effect on a frozen layer."""
        if not self.frozen:
            self._restart_statistics()

    def reset_parameters(self) -> None:
        """Set parameters, running statistics and counters to the values of a new layer, in place, even if frozen."""
        self._restart_statistics()
        super().reset_parameters()

    def _restart_statistics(self) -> None:
        super().reset_running_stats()
        if "nonfinite_batches" in self._buffers:  # absent while torch.nn's constructor runs
            self._restart_nonfinite_batches()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        # The counter belongs to the running statistics that are replaced now. After to_empty() or on the meta device
        # its values are undefined.
        if f"{prefix}running_mean" in state_dict and "nonfinite_batches" in self._buffers:
            self._restart_nonfinite_batches()

    def _restart_nonfinite_batches(self) -> None:
        if self.running_mean is not None and self.running_mean.device != self.nonfinite_batches.device:
            self.nonfinite_batches = torch.empty_like(self.nonfinite_batches, device=self.running_mean.device)
        self.nonfinite_batches.zero_()

    def freeze(self) -> Self:
        """Normalize with the running statistics from now on and update nothing, even after ``train(True)``.

        ``weight`` and ``bias`` still learn. With ``requires_grad_(False)`` on them the layer needs one pass over memory
        in each direction and saves no activation for backward. The state is not part of ``state_dict``.

        Returns:
            The layer itself.

        Raises:
            ValueError: the layer has no running statistics.

        Example:
            >>> import normfused
            >>> layer = normfused.BatchNorm2d(8).freeze()
            >>> layer.train().training
            False
        """
        if self.running_mean is None:
            raise ValueError(f"{type(self).__name__}: there are no running statistics to freeze")
        self.frozen = True
        return self.train(False)

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`: the layer returns to training mode and follows ``train()`` again. Returns itself."""
        self.frozen = False
        return self.train(True)

    def train(self, mode: bool = True) -> Self:
        """As :meth:`torch.nn.Module.train`. A frozen layer stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def __prepare_scriptable__(self) -> nn.Module:
        """The torch.nn layer that ``torch.jit.script`` compiles in place of this one."""
        return scriptable(self, behavioral_options(self))

    def extra_repr(self) -> str:
        options = [f"{name}={value!r}" for name, value in nondefault_options(self).items()]
        return ", ".join([str(super().extra_repr()), *options])  # type: ignore[no-untyped-call]


def nondefault_options(layer: nn.Module) -> dict[str, Any]:
    """The options of ``layer`` that torch.nn's layers lack and that differ from their defaults, by name."""
    options = {name: getattr(layer, name) for name in (*_BEHAVIORAL_OPTIONS, "inplace")}
    return {name: value for name, value in options.items() if value != getattr(_BatchNorm, name)}


# Options that change outputs or running statistics. inplace does not.
_BEHAVIORAL_OPTIONS = ("activation", "activation_param", "running_var_correction", "nonfinite", "frozen")


def behavioral_options(layer: nn.Module) -> dict[str, Any]:
    """Those of :func:`nondefault_options` that change outputs or running statistics."""
    return {name: value for name, value in nondefault_options(layer).items() if name in _BEHAVIORAL_OPTIONS}


def to_torch_class(layer: nn.Module) -> bool:
    """Change a layer to its torch.nn class in place if no option is lost by that. Returns whether it was changed."""
    cls = type(layer)
    stock = cls.__bases__[-1]
    known = cls.__module__.startswith("normfused.") and stock in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not known or behavioral_options(layer):
        return False
    layer.__class__ = stock
    return True


def _traced_as_leaf(module: nn.Module, input: fx.Proxy, *others: Any) -> Any:
    """Record the call of ``module`` as one node, as torch.fx does for torch.nn's layers; it follows train() and eval().

    Returns:
        The proxy of the node; ``None`` if ``module`` is itself the root of the trace.
    """
    if not isinstance(input.tracer, fx.Tracer):
        return None
    path = input.tracer.path_of_module(module)
    while others and others[-1] is None:
        others = others[:-1]
    if not others and any(cls.__module__.startswith("torch.ao.quantization") for cls in type(input.tracer).__mro__):
        to_torch_class(module)  # quantization looks layers up by their class
    return input.tracer.create_proxy("call_module", path, (input, *others), {}) if path else None


class _SequenceBatchNorm(_BatchNorm):
    """Layers that accept sequences too. ``lengths`` is another way to give their ``mask``."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalize ``input``. For the arguments see the class."""
        if lengths is not None:
            mask = self._mask_of(input, mask, lengths)
        return super().forward(input, residual, mask)

    def _mask_of(self, input: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        name = type(self).__name__
        if mask is not None:
            raise ValueError(f"{name}: mask and lengths exclude each other, got both")
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
            assert_async(fits, message)  # without waiting for the device
        elif not fits:
            raise ValueError(f"{message}, got {lengths.tolist()}")
        return torch.arange(input.size(2), device=input.device) < lengths.to(input.device).unsqueeze(1)


class _ActivationBatchNorm(_BatchNorm):
    """Layers with an activation.

    They do not derive from :class:`torch.nn.BatchNorm2d` and its siblings, because code that looks for these classes
    would lose the activation.
    """

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
            raise ValueError(f"{name}: activation_param applies to {kinds} only, got it for {activation!r}")
        if inplace:
            check_invertible(name, activation, parameter)

    def _set_activation(self, activation: str | None, parameter: float | None) -> None:
        self.activation = None if activation == "identity" else activation
        self.activation_param = parameter


class _LazyBatchNorm(_BatchNorm):
    """Layers that infer ``num_features`` from their first input."""

    def __init__(
        self,
        # torch.nn's parameters in torch.nn's order, then keywords
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
        # Skips _BatchNorm.__init__, which has another signature.
        lazy: Any = super(_BatchNorm, self)
        lazy.__init__(eps, momentum, affine, track_running_stats, **factory)
        self._set_options(running_var_correction, nonfinite, inplace)

    def _register_nonfinite_batches(self) -> None:
        # num_features does not tell: torch.nn leaves it at 0 if a state_dict brings the shapes.
        if self.running_mean is not None and not nn.parameter.is_lazy(self.running_mean):
            super()._register_nonfinite_batches()

    def initialize_parameters(self, input: Tensor) -> None:
        """Create parameters and buffers for the channels of ``input``."""
        super().initialize_parameters(input)  # type: ignore[misc]
        if self.nonfinite == "skip":
            self._register_nonfinite_batches()
