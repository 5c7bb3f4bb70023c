"""A whole model at once: torch.nn's batch norms made ours and back, fused with what follows them, folded away."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normfused import modules
from normfused.distributed import SyncBatchNorm, SyncBatchNormAct, _Synchronized
from normfused.reference import ACTIVATION_PARAMS, ACTIVATIONS

__all__ = ["Conversion", "convert", "convert_sync_batchnorm", "fold_bn", "kept_for_backward", "revert"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_STOCK = {ours: stock for stock, ours in _OURS.items()}
_WITH_ACTIVATION = (modules.BatchNormAct1d, modules.BatchNormAct2d, modules.BatchNormAct3d, SyncBatchNormAct)

Activation = tuple[str, float]


@dataclass
class Conversion:
    """What :func:`convert` did. ``print`` gives a table."""

    model: nn.Module
    inplace: bool = False  # as asked for
    replaced: list[tuple[str, str]] = field(default_factory=list)  # path, class
    fused: list[tuple[str, str]] = field(default_factory=list)  # path, what now follows in the same pass
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path, why
    bytes_before: int | None = None  # kept for backward, by the example
    bytes_after: int | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} batch norms replaced, {len(self.fused)} fused, {len(self.skipped)} skipped"]
        rows = [(path, what, "replaced") for path, what in self.replaced if path not in dict(self.fused)]
        rows += [(path, what, "fused") for path, what in self.fused]
        rows += [(path, why, "skipped") for path, why in self.skipped]
        width = max((len(path) for path, *_ in rows), default=0)
        lines += [f"  {kind:8}  {path:{width}}  {what}" for path, what, kind in rows]
        if self.bytes_before is not None and self.bytes_after is not None:
            share = 1 - self.bytes_after / max(self.bytes_before, 1)
            lines.append(
                f"kept for backward: {self.bytes_before / 2**20:.1f} MiB before, "
                f"{self.bytes_after / 2**20:.1f} MiB after ({abs(share):.0%} {'less' if share > 0 else 'more'})"
            )
        return "\n".join(lines)


def convert(
    model: nn.Module,
    fuse: bool = True,
    inplace: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
) -> Conversion:
    """Make every ``torch.nn.BatchNorm1d/2d/3d`` and ``SyncBatchNorm`` in ``model`` ours, and fuse what follows it.

    The layers change their class in place: parameters, buffers, training flag, hooks, names and sharing are as before.
    Subclasses of torch.nn's layers are left alone and named in the report.

    With ``fuse``, batch norms that are followed by an activation, by an addition, or by both, do that in the same pass,
    where nothing else reads what lies between. This needs a graph from :mod:`torch.fx`, so ``Conversion.model`` is then
    a :class:`torch.fx.GraphModule` that shares all modules with ``model``; parts that cannot be traced keep their
    Python code, and their children are tried one by one.

    Args:
        model: any module, in training or evaluation mode; its layers are changed.
        fuse: whether to look for what follows.
        inplace: whether batch norms with a leaky ReLU behind them are written over their input, where that comes from a
            convolution or a linear layer, nothing else reads it, and nothing is written over the result. What that
            means for gradients: :func:`normfused.functional.batch_norm`. Needs ``fuse``.
        example_inputs: arguments of ``model``. Where given, a copy of the model runs on them, before and after, and the
            report says how many bytes each keeps for backward.

    Raises:
        TypeError: ``model`` is not a module. ValueError: ``inplace`` without ``fuse``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if inplace and not fuse:
        raise ValueError("convert: inplace=True needs fuse=True, which finds where it can be")
    report = Conversion(model, inplace)
    if example_inputs is not None:
        report.bytes_before = kept_for_backward(copy.deepcopy(model), *example_inputs)
    if fuse:
        report.model = _fused(model, "", report, {})
    for path, module in model.named_modules():
        ours = _OURS.get(type(module))
        if ours is not None:
            module.__class__ = ours
            report.replaced.append((path, f"torch.nn.{ours.__name__}"))
        elif isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, modules._BatchNorm):
            report.skipped.append((path, f"{type(module).__name__} is not one of torch.nn's plain batch norms"))
    if example_inputs is not None:
        report.bytes_after = kept_for_backward(copy.deepcopy(report.model), *example_inputs)
    return report


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Make every batch norm in ``model`` a :class:`normfused.SyncBatchNorm`, of any number of dimensions.

    Those with an activation become :class:`normfused.SyncBatchNormAct`, and lazy ones one of them at their first input.
    torch.nn's layers and ours change their class in place: parameters, buffers, activations, training flag, hooks,
    names and sharing are as before. Subclasses are left alone, with a warning. :func:`revert` undoes it.

    Args:
        model: any module; its layers are changed. A layer by itself will do.
        process_group: over which they are synchronized; default all processes.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module. ValueError: a layer that writes over its input (``inplace=True``), before
        any layer is changed.

    Warns:
        RuntimeWarning: a batch norm of another class, which is left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_sync_batchnorm: model must be a torch.nn.Module, got {type(model).__name__}")
    norms: list[tuple[str, Any]] = [
        (path, m) for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    for path, layer in norms:
        if getattr(layer, "inplace", False):
            raise ValueError(f"convert_sync_batchnorm: {path or 'model'} has inplace=True, and cannot be synchronized")
    for path, layer in norms:
        if type(layer) in (*_OURS, *_STOCK, *_WITH_ACTIVATION):
            if not isinstance(layer, _Synchronized):
                _synchronize(layer)
            layer.path, layer.process_group = path, process_group
        else:
            warnings.warn(
                f"convert_sync_batchnorm leaves {path or 'model'} alone: {type(layer).__name__} is not one of "
                "torch.nn's plain batch norms or ours",
                RuntimeWarning,
                stacklevel=2,
            )
    return model


def _synchronize(layer: Any) -> None:
    """Change the layer's class, or, where it is lazy, the one that its first input makes it."""
    is_lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    if is_lazy:
        layer.converted_from = layer.cls_to_become
        layer.__class__, layer.cls_to_become = _OURS.get(type(layer), type(layer)), SyncBatchNorm
    else:
        layer.converted_from = type(layer)
        layer.__class__ = SyncBatchNormAct if type(layer) in _WITH_ACTIVATION else SyncBatchNorm


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert` and :func:`convert_sync_batchnorm`.

    Our batch norms become torch.nn's, and fused graphs the modules that they were made from.

    Layers with an activation or another option of ours keep their class, because torch.nn's have none.
    Returns the model, which is another object where ``model`` is a fused graph.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    model = _sources(model)
    for module in model.modules():
        before = getattr(module, "converted_from", None) if isinstance(module, modules._BatchNorm) else None
        if before is not None:
            if not isinstance(module, nn.modules.lazy.LazyModuleMixin):
                module.__class__ = before
            for name in ("converted_from", "path", "process_group", "cls_to_become"):
                module.__dict__.pop(name, None)
        stock = _STOCK.get(type(module))
        if stock is not None and not modules.own_options(module):
            module.__class__ = stock
    return model


def kept_for_backward(model: nn.Module, *inputs: Any) -> int:
    """Bytes that a forward pass of ``model`` keeps for backward, without its parameters and buffers.

    The pass runs as any other: it updates running statistics where the model is in training mode.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)  # which keeps alive what is counted, so that no address comes up twice
    del output
    return sum(kept.values())


# ---- fusion ----------------------------------------------------------------------------------------------------------


def fused_call(
    layer: nn.Module,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    parameter: float,
    inplace: bool,
) -> Tensor:
    """``activation(layer(input) + residual)``, in one pass where it can be.

    It cannot where the two summands differ in shape or dtype, or where the layer has got hooks meanwhile.
    """
    if has_torch_function_variadic(input, residual):  # a loaded graph is traced anew, and keeps this call whole
        arguments = (layer, input, residual, activation, parameter, inplace)
        return handle_torch_function(fused_call, (input, residual), *arguments)
    alike = residual is None or (residual.shape == input.shape and residual.dtype == input.dtype)
    if alike and isinstance(layer, modules._BatchNorm) and not _has_hooks(layer):
        return layer._batch_norm(*layer._arguments(input, residual, None, activation, parameter, inplace))
    output = layer(input) if residual is None else layer(input) + residual
    return ACTIVATIONS[activation](output, parameter)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is; for fx's own it would be ``x = x + y``, which leaves x's other names alone."""


def _in_place(operation: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, f"i{operation}")
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in _IN_PLACE:
    setattr(_Proxy, f"__i{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Does not look into modules with hooks, which a graph would not call, nor into our own layers."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if _has_hooks(module) or isinstance(module, modules._BatchNorm):
            return True
        return super().is_leaf_module(module, name)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every flag at `training`, past any train() that has ideas of its own."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, flag in before:
            module.training = flag


def _traced(model: nn.Module) -> fx.Graph:
    graphs = []
    for training in (True, False):
        with _mode(model, training):
            graphs.append(_Tracer().trace(model))
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("does not do the same in training and evaluation")
    for node in graphs[0].nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation as a string, of which pickle would ask the name
    return graphs[0]


def _fused(module: nn.Module, path: str, report: Conversion, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` as a graph with its batch norms fused; itself, its children fused, where it cannot be traced."""
    if module in done:
        return done[module]
    done[module] = module
    norms = (*_OURS, *_OURS.values())
    if isinstance(module, norms) or not any(isinstance(m, norms) for m in module.modules()):
        return module
    reason = "it has hooks" if _has_hooks(module) else None
    if reason is None and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        try:
            graph = _traced(module)
        except Exception as error:  # whatever the model's code raises when it meets a proxy
            reason = f"not traced: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        else:
            if _fuse_graph(module, graph, path, report):
                done[module] = _graph_module(module, graph)
            # What the graph calls as a whole, because it has hooks or is torch.nn's own, is looked into by itself.
            for node in graph.nodes:
                if node.op == "call_module":
                    leaf = module.get_submodule(str(node.target))
                    _fuse_children(leaf, _join(path, str(node.target)), report, done)
            return done[module]
    if reason is not None:
        report.skipped.append((path or type(module).__name__, reason))
    _fuse_children(module, path, report, done)
    return module


def _fuse_children(module: nn.Module, path: str, report: Conversion, done: dict[nn.Module, nn.Module]) -> None:
    for name, child in module.named_children():
        fused = _fused(child, _join(path, name), report, done)
        if fused is not child:
            setattr(module, name, fused)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _graph_module(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module that has all of the other's children, parameters and buffers for its own."""
    graph.lint()
    result = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(result, kind, copy.copy(getattr(module, kind)))
    result.meta["normfused_source"] = module
    return result


def _sources(module: nn.Module) -> nn.Module:
    """`module` with every fused graph replaced by what it was made from, or by a graph without fusion if copied."""
    if isinstance(module, fx.GraphModule) and "normfused_source" in module.meta:
        source = module.meta["normfused_source"]
        shared = [*map(id, module.children())] == [*map(id, source.children())]
        module = source if shared else _unfused(module)
    for name, child in module.named_children():
        source = _sources(child)
        if source is not child:
            setattr(module, name, source)
    return module


def _unfused(module: fx.GraphModule) -> fx.GraphModule:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not fused_call:
            continue
        layer, x, residual, activation, parameter, _ = node.args
        with graph.inserting_before(node):
            y = graph.call_module(layer.target, (x,))
            if residual is not None:
                y = graph.call_function(operator.add, (y, residual))
            y = graph.call_function(ACTIVATIONS[activation], (y, parameter))
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    del module.meta["normfused_source"]
    return module


def _fuse_graph(root: nn.Module, graph: fx.Graph, path: str, report: Conversion) -> bool:
    """Fuse what can be, in place. Whether anything was."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    fused = False
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        layer = root.get_submodule(str(node.target))
        if type(layer) not in _OURS and type(layer) not in _STOCK:
            continue
        where = _join(path, str(node.target))
        if len(node.args) != 1 or node.kwargs or (isinstance(layer, modules._BatchNorm) and layer.inplace):
            continue  # ours already, with something of its own behind it, or written over what it reads
        match = _what_follows(root, node)
        if isinstance(match, str):
            report.skipped.append((where, match))
            continue
        if match is None:
            continue
        last, residual, (activation, parameter) = match
        reason = _obstacle(root, node, last, residual, order)
        if reason is not None:
            report.skipped.append((where, reason))
            continue
        undoable = residual is None and activation == "leaky_relu" and parameter > 0
        inplace = report.inplace and undoable and _may_write_over_input(root, node, last)
        with graph.inserting_before(last):
            layer_node = graph.get_attr(str(node.target))
            arguments = (layer_node, node.args[0], residual, activation, parameter, inplace)
            new = graph.call_function(fused_call, arguments)
        last.replace_all_uses_with(new)
        while last is not node:
            before = next(n for n in last.all_input_nodes if n is node or node in n.all_input_nodes)
            graph.erase_node(last)
            last = before
        graph.erase_node(node)
        order[new] = order[last]
        words = [*(["add"] if residual is not None else []), *([activation] if activation != "identity" else [])]
        place = ", in place" if inplace else ""
        report.fused.append((where, f"{type(layer).__name__} + {' + '.join(words)}{place}"))
        fused = True
    return fused


_ADDITIONS = (operator.add, operator.iadd, torch.add)


def _what_follows(root: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node | None, Activation] | str | None:
    """The last node of what can be fused behind a batch norm, what is added on the way, and the activation.

    None where nothing follows that could be fused; a reason where it cannot though it looks like it.
    """
    if len(node.users) != 1:
        followers = [user for user in node.users if _activation_of(root, user) is not None]
        return "its output is read by others too" if followers else None
    (user,) = node.users
    activation = _activation_of(root, user)
    if activation is not None:
        return user, None, activation
    if not _is_addition(user):
        return None
    a, b = user.args
    residual = b if a is node else a
    if not isinstance(residual, fx.Node) or residual is node:
        return None
    if a is residual and (user.target is operator.iadd or user.target == "add_"):
        return "it is added in place to something that others may read"
    if len(user.users) == 1:
        (after,) = user.users
        activation = _activation_of(root, after)
        if activation is not None:
            return after, residual, activation
    return user, residual, ("identity", 0.0)


def _is_addition(node: fx.Node) -> bool:
    if node.op == "call_function":
        known = node.target in _ADDITIONS
    else:
        known = node.op == "call_method" and node.target in ("add", "add_")
    return known and len(node.args) == 2 and not node.kwargs


def _obstacle(
    root: nn.Module,
    node: fx.Node,
    last: fx.Node,
    residual: fx.Node | None,
    order: dict[fx.Node, int],
) -> str | None:
    """Why computing everything at the place of the last node would not be the same."""
    layer = root.get_submodule(str(node.target))
    followers = [root.get_submodule(str(last.target))] if last.op == "call_module" else []
    if any(_has_hooks(module) for module in (layer, *followers)):
        return "it or what follows has hooks"
    for operand in (node.args[0], residual):
        if not isinstance(operand, fx.Node):
            continue
        for user in operand.users:
            between = order[node] < order[user] < order[last] and user not in node.users
            if between and _changes_operands(root, user):
                return "what it reads is changed in place before"
    return None


def _may_write_over_input(root: nn.Module, node: fx.Node, last: fx.Node) -> bool:
    """Whether a batch norm's input is its own to write over, and what stands there at the last node stays."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return False
    module = root.get_submodule(str(source.target))
    changed = any(_changes_operands(root, user) for user in last.users)
    return isinstance(module, _FOLDABLE) and not _has_hooks(module) and not changed


def _changes_operands(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name[:1] == "i" and name[1:] in _IN_PLACE) or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(node.kwargs.get("inplace"))


_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda _: ("relu", 0.0),
    nn.ReLU6: lambda _: ("relu6", 0.0),
    nn.LeakyReLU: lambda m: ("leaky_relu", m.negative_slope),
    nn.ELU: lambda m: ("elu", m.alpha),
    nn.Hardswish: lambda _: ("hardswish", 0.0),
    nn.Sigmoid: lambda _: ("sigmoid", 0.0),
    nn.Tanh: lambda _: ("tanh", 0.0),
    nn.SiLU: lambda _: ("silu", 0.0),
    nn.GELU: lambda m: ("gelu_tanh" if m.approximate == "tanh" else "gelu", 0.0),
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.elu, F.elu_), "elu"),
    F.hardswish: "hardswish",
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh", "tanh_"), "tanh"),
    F.silu: "silu",
    F.gelu: "gelu",
}
_PARAMETERS = {"leaky_relu": "negative_slope", "elu": "alpha"}


def _activation_of(root: nn.Module, node: fx.Node) -> Activation | None:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        describe = _MODULES.get(type(module))
        return describe(module) if describe is not None else None
    name = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None:
        return None
    rest = list(node.args[1:])
    options = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    if name == "gelu":
        return ("gelu_tanh" if options.get("approximate", "none") == "tanh" else "gelu", 0.0)
    parameter = options.get(_PARAMETERS.get(name, ""), rest[0] if name in _PARAMETERS and rest else None)
    if parameter is None:
        parameter = ACTIVATION_PARAMS.get(name, 0.0)
    return (name, float(parameter)) if isinstance(parameter, (int, float)) else None


# ---- folding ---------------------------------------------------------------------------------------------------------

_Folded = TypeVar("_Folded", bound=nn.Module)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@torch.no_grad()
def fold_bn(previous: _Folded, bn: nn.Module) -> _Folded:
    """A copy of ``previous`` that does what it and the batch norm behind it do in evaluation.

    Args:
        previous: ``Linear``, ``Conv1d/2d/3d`` or ``ConvTranspose1d/2d/3d``, of any groups, with a bias or without.
        bn: a batch norm of torch.nn's or ours, in evaluation mode, with running statistics and no activation.

    Returns:
        A new module, with a bias, in ``previous``' dtype; the arithmetic is in float32 or wider. Neither argument is
        changed.

    Raises:
        TypeError: one of them is of another kind. ValueError: ``bn`` is in training mode, has no running statistics, an
        activation, or not as many channels as ``previous`` gives.
    """
    if not isinstance(previous, _FOLDABLE):
        raise TypeError(f"fold_bn: previous must be a Linear, Conv or ConvTranspose, got {type(previous).__name__}")
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"fold_bn: bn must be a batch norm, got {type(bn).__name__}")
    if bn.training:
        raise ValueError("fold_bn: bn is in training mode, in which it depends on the batch; call eval() first")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn has no running statistics")
    if getattr(bn, "activation", None):
        raise ValueError(f"fold_bn: bn has an activation, {bn.activation!r}, which cannot be folded")
    channels = previous.out_features if isinstance(previous, nn.Linear) else previous.out_channels
    if channels != bn.num_features:
        raise ValueError(f"fold_bn: bn has {bn.num_features} channels, but previous gives {channels}")

    dtype = torch.promote_types(previous.weight.dtype, torch.float32)
    mean, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
    scale = (var + (bn.epsilon if isinstance(bn, modules._BatchNorm) else bn.eps)).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    weight = previous.weight.to(dtype)
    if isinstance(previous, _TRANSPOSED):  # (in, out / groups, ...): the groups follow each other along the first
        groups = previous.groups
        parts = weight.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = parts.flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = torch.zeros_like(mean) if previous.bias is None else previous.bias.to(dtype)
    bias = (bias - mean) * scale
    if bn.bias is not None:
        bias = bias + bn.bias.to(dtype)

    folded = copy.deepcopy(previous)
    folded.weight = nn.Parameter(weight.to(previous.weight.dtype), previous.weight.requires_grad)
    folded.bias = nn.Parameter(bias.to(previous.weight.dtype), previous.weight.requires_grad)
    return folded
