"""Conversion of whole models, in place, and back."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from normfused._torch_private import NormBase, dynamo_unavailable_reason, map_tensors
from normfused.batch_norm_base import _BatchNorm
from normfused.conversion import classes
from normfused.conversion.report import ConversionReport, by_class, bytes_saved_for_backward, forget, remember
from normfused.distributed import ddp
from normfused.distributed.layers import SyncBatchNorm, SyncBatchNormAct, _Synchronized

Model = TypeVar("Model", bound=nn.Module)


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


def convert(
    model: Model,
    fuse: bool = True,
    inplace: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
) -> Model:
    """Replace the norms of ``model`` by this package's, and fuse them with the operations next to them.

    **Replacement** changes the class of layers in place: ``torch.nn.BatchNorm1d/2d/3d``, ``SyncBatchNorm``,
    ``GroupNorm``, ``InstanceNorm1d/2d/3d``, ``LayerNorm`` and ``RMSNorm``, known layers of timm, torchvision and
    detectron2, and classes of :func:`register_conversion`. Parameters, buffers,
    training flags, hooks, names and sharing are unchanged. Other subclasses of torch.nn's layers are skipped, and
    listed in the report.

    **Fusion** runs the calls of the model through Dynamo, as after ``model.compile(backend="normfused")``. In each
    captured graph a batch, group or instance norm, an addition of a tensor of the same shape and dtype, and an
    activation become one operator, if nothing else reads or writes the intermediate results. So do a layer norm or RMS
    norm and the addition before it, whose sum stays a result. All other nodes run as before, with eager
    autograd. Dynamo's guards capture a new graph for another mode, branch or attribute; such a call takes longer.
    The conversion itself runs no code of the model.

    A copy (``copy.deepcopy``) of a converted model, and a model loaded from a file, have the replaced layers. They fuse
    nothing until they are converted themselves.

    Args:
        model: any module, in training or evaluation mode. It is changed.
        fuse: whether to capture and fuse calls. ``False``: only replace layers.
        inplace: whether to write the output over the input for batch norms that are followed by a leaky ReLU, if the
            input is the result of a convolution or linear layer and nothing else reads it. For the effect on gradients
            see :func:`normfused.functional.batch_norm`. Requires ``fuse``.
        example_inputs: arguments of ``model``. If given, copies of the model run on copies of them before and after the
            conversion, and the report lists what is fused and the bytes saved for backward. The random number
            generators of torch, Python and NumPy are restored.

    Returns:
        ``model`` itself. :func:`conversion_report` returns what was done.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` not a tuple.
        ValueError: ``inplace`` without ``fuse``.

    Example:
        >>> import torch, normfused
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = normfused.convert(model, fuse=False)
        >>> type(model[1]).__module__
        'normfused.modules'
        >>> model(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """
    _check_model("convert", model)
    if inplace and not fuse:
        raise ValueError("convert: inplace=True needs fuse=True")
    if not isinstance(example_inputs, (tuple, list, type(None))):
        kind = type(example_inputs).__name__
        raise TypeError(
            f"convert: example_inputs must be a tuple of the model's arguments, got {kind}: write (x,) for one"
        )
    report = ConversionReport(fuse, inplace)
    if example_inputs is not None:
        report.bytes_before = _saved_by(copy.deepcopy(model), example_inputs)
    _replace_layers(model, report)
    if fuse:
        _install(model, report)
    if example_inputs is not None:
        trial = copy.deepcopy(model)
        if fuse:
            _install(trial, report)
        report.bytes_after = _saved_by(trial, example_inputs)
    remember(model, report)
    return model


def _replace_layers(model: nn.Module, report: ConversionReport) -> None:
    skipped = []
    for path, layer in model.named_modules():
        ours = classes.class_for(type(layer))
        name = f"{type(layer).__module__}.{type(layer).__qualname__}"
        if ours is not None:
            reason = classes.skip_reason(layer)
            if reason is None:
                report.replaced.append((path, _short(type(layer))))
                layer.__class__ = ours
                if issubclass(ours, _Synchronized):
                    ddp.admit(_Synchronized)
            else:
                skipped.append((path, f"{name}: {reason}"))
        elif classes.is_ours(layer):
            report.replaced.append((path, type(layer).__name__))
        elif classes.is_foreign(layer):
            skipped.append((path, f"{name} is not a known class; normfused.register_conversion adds it"))
    report.skipped = by_class(skipped)


def _short(kind: type) -> str:
    return (
        f"torch.nn.{kind.__name__}"
        if kind in classes.PLAIN or kind in classes.SAMPLE_NORMS
        else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
    )


def _install(model: nn.Module, report: ConversionReport) -> None:

    from normfused.conversion import capture

    report.unavailable_reason = dynamo_unavailable_reason()
    if report.unavailable_reason is None:
        capture.install(model, report)


def _saved_by(trial: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Bytes that ``trial`` saves for backward. Inputs and random number generators do not change."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # the legacy generator that user code draws from
    try:
        with torch.random.fork_rng():
            return bytes_saved_for_backward(trial, *map_tensors(copied, inputs))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def convert_sync_batchnorm(model: Model, process_group: Any = None) -> Model:
    """Make each batch norm in ``model`` a :class:`normfused.SyncBatchNorm`, for any number of dimensions.

    Layers with an activation become :class:`normfused.SyncBatchNormAct`. Lazy layers change at their first input. The
    layers of torch.nn and of this package change their class in place. Parameters, buffers, activations, training
    flags, hooks, names and sharing are unchanged. :func:`revert` undoes the conversion.

    Args:
        model: any module, or a single layer. It is changed.
        process_group: the processes whose batches are normalized together; default all.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer has ``inplace=True``. No layer has changed then.

    Warns:
        RuntimeWarning: a batch norm of another class, which is skipped.

    Example:
        >>> import normfused
        >>> from torch import nn
        >>> model = normfused.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(model[1]).__name__
        'SyncBatchNorm'
    """
    _check_model("convert_sync_batchnorm", model)
    norms: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if isinstance(m, NormBase)]
    for path, layer in norms:
        if getattr(layer, "inplace", False) and isinstance(layer, _BatchNorm):
            raise ValueError(f"convert_sync_batchnorm: {path or 'model'} has inplace=True, and cannot be synchronized")
    for path, layer in norms:
        if type(layer) in (*classes.PLAIN, *classes.STOCK, *classes.WITH_ACTIVATION):
            if not isinstance(layer, _Synchronized):
                _synchronize(layer)
            layer.path, layer.process_group = path, process_group
        else:
            warnings.warn(
                f"convert_sync_batchnorm skips {path or 'model'}: {type(layer).__name__} is not a batch norm class of "
                "torch.nn or normfused",
                RuntimeWarning,
                stacklevel=2,
            )
    return model


def _synchronize(layer: Any) -> None:
    """Change the class of ``layer``; for a lazy layer, the class that it gets at its first input."""
    ddp.admit(_Synchronized)
    is_lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    if is_lazy:
        layer.converted_from = layer.cls_to_become
        layer.__class__, layer.cls_to_become = classes.PLAIN.get(type(layer), type(layer)), SyncBatchNorm
    else:
        layer.converted_from = type(layer)
        layer.__class__ = SyncBatchNormAct if type(layer) in classes.WITH_ACTIVATION else SyncBatchNorm


def revert(model: Model) -> Model:
    """Undo :func:`convert` and :func:`convert_sync_batchnorm`, in place.

    Layers get the class that they had before, and keep their current parameters and buffers. Calls are no longer
    captured. Layers with an activation or another option that torch.nn lacks keep their class.

    Args:
        model: any module. It is changed.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import normfused
        >>> from torch import nn
        >>> model = normfused.revert(normfused.convert(nn.Sequential(nn.BatchNorm2d(8)), fuse=False))
        >>> type(model[0]) is nn.BatchNorm2d
        True
    """
    _check_model("revert", model)
    from normfused.conversion import capture

    capture.uninstall(model)
    forget(model)
    for layer in model.modules():
        before = layer.__dict__.get("converted_from")
        if before is not None and isinstance(layer, _BatchNorm):
            if not isinstance(layer, nn.modules.lazy.LazyModuleMixin):
                layer.__class__ = before
            for name in ("converted_from", "path", "process_group", "cls_to_become"):
                layer.__dict__.pop(name, None)
        source = classes.source_of(layer)
        if source is not None:
            layer.__class__ = source
    return model
