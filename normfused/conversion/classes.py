"""Which class replaces a layer's class: for torch.nn, known libraries, and classes that users register.

Classes are compared exactly. A subclass may override forward, so it is replaced only if it is registered.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from normfused import functional, layer_norm_layers, modules, sample_norm_layers
from normfused._torch_private import BatchNormBase, InstanceNormBase
from normfused.batch_norm_base import _BatchNorm, nondefault_options
from normfused.distributed.layers import SyncBatchNorm, SyncBatchNormAct
from normfused.layer_norms import run_layer_norm
from normfused.sample_norms import run_group_norm

# For torch.nn's layers only the class changes. These are the batch norms.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
STOCK = {ours: stock for stock, ours in PLAIN.items()}
# The norms whose statistics are those of one sample.
SAMPLE_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: sample_norm_layers.GroupNorm,
    nn.InstanceNorm1d: sample_norm_layers.InstanceNorm1d,
    nn.InstanceNorm2d: sample_norm_layers.InstanceNorm2d,
    nn.InstanceNorm3d: sample_norm_layers.InstanceNorm3d,
    nn.LayerNorm: layer_norm_layers.LayerNorm,
    nn.RMSNorm: layer_norm_layers.RMSNorm,
}
_STOCK_SAMPLE_NORMS = {ours: stock for stock, ours in SAMPLE_NORMS.items()}
_OUR_SAMPLE_NORMS = (
    sample_norm_layers._GroupNorm,
    sample_norm_layers._InstanceNorm,
    layer_norm_layers._LayerNorm,
)
WITH_ACTIVATION = (modules.BatchNormAct1d, modules.BatchNormAct2d, modules.BatchNormAct3d, SyncBatchNormAct)

_registered: dict[type[nn.Module], type[nn.Module]] = {}


class _Adapted:
    """A layer of another library with this package's norm: a subclass of its class, created on demand."""

    converted_from: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be imported by name. Copies and pickles store the class that it was derived from.
        return _rebuild, (type(self).converted_from,), self.__getstate__()


def _rebuild(source: type[nn.Module]) -> nn.Module:
    adapted = class_for(source)
    result: nn.Module = (source if adapted is None else adapted).__new__(source if adapted is None else adapted)
    return result


class _NormThenDropThenAct:
    """Layers of timm: batch norm, then ``self.drop`` and ``self.act``."""

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = super().forward(x)  # type: ignore[misc]
        result: Tensor = self.act(self.drop(normalized))  # type: ignore[attr-defined]
        return result


class _Frozen:
    """Layers whose statistics, weight and bias are constant buffers."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # type: ignore[attr-defined]  # torch promotes the result to the wider dtype
            result: Tensor = super().forward(x)  # type: ignore[misc]
            return result
        constants = (self.running_mean, self.running_var, self.weight, self.bias)  # type: ignore[attr-defined]
        return functional.batch_norm(x, *constants, training=False, eps=self.eps)  # type: ignore[attr-defined]


class _FrozenThenDropThenAct(_Frozen):
    """The frozen layer of timm."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # type: ignore[attr-defined]
            return super().forward(x)
        result: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[attr-defined]
        return result


class _Fast:
    """Layers of timm with an option for lower precision under autocast, which its own forward handles."""

    def _is_fast(self) -> bool:
        return bool(self._fast_norm)  # type: ignore[attr-defined]


class _GroupNorm(_Fast):
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if self._is_fast():
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return run_group_norm("GroupNorm", x, layer.num_groups, layer.weight, layer.bias, layer.eps)


class _LayerNorm(_Fast):
    def forward(self, x: Tensor) -> Any:
        layer: Any = self
        if self._is_fast():
            return super().forward(x)  # type: ignore[misc]
        return run_layer_norm("LayerNorm", x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


class _LayerNorm2d(_Fast):
    """Layers that permute the channels of (N, C, H, W) to the end and back."""

    def _is_fast(self) -> bool:
        return bool(getattr(self, "_fast_norm", False))  # torchvision's layer has no such option

    def forward(self, x: Tensor) -> Any:
        layer: Any = self
        if self._is_fast() or x.dim() != 4 or layer.normalized_shape != (x.size(1),):
            return super().forward(x)  # type: ignore[misc]
        return run_layer_norm("LayerNorm2d", x, None, layer.weight, layer.bias, layer.eps)


# Keys are module and class names, so that no library is imported. Values are the classes that the replacement inherits
# from, before the class itself, and the attributes that its forward needs.
_TIMM = ("timm.layers.norm_act", "timm.models.layers.norm_act")
_TIMM_NORM = ("timm.layers.norm", "timm.models.layers.norm")
_KNOWN: dict[tuple[str, str], tuple[tuple[type, ...], tuple[str, ...]]] = {
    **{(m, "BatchNormAct2d"): ((_NormThenDropThenAct, modules.BatchNorm2d), ("drop", "act")) for m in _TIMM},
    **{(m, "SyncBatchNormAct"): ((_NormThenDropThenAct, SyncBatchNorm), ("drop", "act")) for m in _TIMM},
    **{(m, "FrozenBatchNormAct2d"): ((_FrozenThenDropThenAct,), ("drop", "act")) for m in _TIMM},
    **{(m, "GroupNorm"): ((_GroupNorm,), ("_fast_norm",)) for m in _TIMM_NORM},
    **{(m, "GroupNorm1"): ((_GroupNorm,), ("_fast_norm",)) for m in _TIMM_NORM},
    **{(m, "LayerNorm"): ((_LayerNorm,), ("_fast_norm",)) for m in _TIMM_NORM},
    **{(m, "LayerNorm2d"): ((_LayerNorm2d,), ("_fast_norm",)) for m in _TIMM_NORM},
    ("torchvision.models.convnext", "LayerNorm2d"): ((_LayerNorm2d,), ()),
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): ((_Frozen,), ()),
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"): ((_Frozen,), ()),
}


def register_conversion(source: type[nn.Module], target: type[nn.Module] | None = None) -> None:
    """Let :func:`normfused.convert` replace layers of another class, in this process.

    Args:
        source: the class to replace, compared exactly. Its subclasses are not replaced.
        target: the class that replaces it. It must compute the same from the same attributes. By default ``source``
            must be a subclass of one of ``torch.nn``'s norms that calls ``super().forward``. Its layers then become a
            subclass of ``source`` in which that call runs this package's norm.

    Raises:
        TypeError: an argument is not a module class, or ``source`` needs a ``target``.

    Example:
        >>> import normfused
        >>> from torch import nn
        >>> class ScaledBatchNorm2d(nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x) * 2
        >>> normfused.register_conversion(ScaledBatchNorm2d)
        >>> model = normfused.convert(nn.Sequential(ScaledBatchNorm2d(8)), fuse=False)
        >>> normfused.conversion_report(model).skipped
        []
    """
    for name, value in (("source", source), ("target", target)):
        if not (isinstance(value, type) and issubclass(value, nn.Module)) and not (name == "target" and value is None):
            raise TypeError(f"register_conversion: {name} must be a subclass of torch.nn.Module, got {value!r}")
    if target is None:
        known = PLAIN | SAMPLE_NORMS
        bases = [ours for stock, ours in known.items() if issubclass(source, stock)]
        if not bases or source in known or is_ours_class(source):
            raise TypeError(
                f"register_conversion: {source.__name__} needs a target, "
                "because it is not a subclass of torch.nn's norms"
            )
        target = _adapt(source, (bases[0],))
    _registered[source] = target


def _adapt(source: type[nn.Module], before: tuple[type, ...]) -> type[nn.Module]:
    own: list[type] = [base for base in before if issubclass(base, nn.Module)]
    other: list[type] = [base for base in before if base not in own]
    # Methods of `source` override those of this package, unless its forward is replaced as a whole.
    bases: tuple[type, ...] = (_Adapted, *other, *own, source) if other else (_Adapted, source, *own)
    attributes = {"converted_from": source, "__module__": source.__module__, "__qualname__": source.__qualname__}
    adapted: type[nn.Module] = type(source.__name__, bases, attributes)
    return adapted


def class_for(source: type[nn.Module]) -> type[nn.Module] | None:
    """The class that replaces exactly this class; ``None`` if its layers are not replaced."""
    if issubclass(source, _Adapted):  # it has the name of the class that it was derived from
        return None
    target = PLAIN.get(source) or SAMPLE_NORMS.get(source) or _registered.get(source)
    if target is None and (known := _KNOWN.get((source.__module__, source.__qualname__))) is not None:
        target = _registered[source] = _adapt(source, known[0])
    return target


def skip_reason(layer: nn.Module) -> str | None:
    """Why a layer of a known class is not replaced; ``None`` if it is."""
    known = _KNOWN.get((type(layer).__module__, type(layer).__qualname__))
    missing = [name for name in (known[1] if known is not None else ()) if not hasattr(layer, name)]
    if missing:
        return f"it has no {missing[0]}"
    return "its forward is replaced on the layer itself" if "forward" in layer.__dict__ else None


def source_of(layer: nn.Module) -> type[nn.Module] | None:
    """The class of a converted layer before the conversion.

    ``None`` if it was not converted, or if it has options that the former class lacks.
    """
    kind = type(layer)
    if kind in STOCK:
        return None if nondefault_options(layer) else STOCK[kind]
    if kind in _STOCK_SAMPLE_NORMS:
        return None if getattr(layer, "scale_offset", 0.0) else _STOCK_SAMPLE_NORMS[kind]
    if issubclass(kind, _Adapted):
        return kind.converted_from
    return next((source for source, target in _registered.items() if target is kind), None)


def is_ours_class(kind: type) -> bool:
    """Whether layers of this class run one of this package's norms."""
    return issubclass(kind, (_BatchNorm, *_OUR_SAMPLE_NORMS, _Adapted)) or kind in _registered.values()


def is_ours(layer: nn.Module) -> bool:
    """Whether ``layer`` runs one of this package's norms."""
    return is_ours_class(type(layer))


def is_foreign(layer: nn.Module) -> bool:
    """Whether ``layer`` is a norm of an unknown class, which the report lists."""
    if is_ours(layer):
        return False
    if isinstance(layer, (InstanceNormBase, *SAMPLE_NORMS)):
        return True
    looks_like_one = {"running_mean", "running_var"} <= {*layer._buffers, *layer._parameters}
    return isinstance(layer, BatchNormBase) or looks_like_one
