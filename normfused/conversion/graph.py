"""Analysis of a captured FX graph: what a node writes, which values share memory, which activation a node computes.

The graphs are Dynamo's. They are not functionalized: a node may write its operands, and views share memory with their
bases. All answers are conservative: an unknown node counts as one that writes all its operands.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from normfused._torch_private import HigherOrderOperator, OpOverload, OpOverloadPacket
from normfused.activations import ACTIVATION_PARAMS

Activation = tuple[str, float]  # name and parameter


def value_of(node: fx.Node) -> Any:
    """The fake result that Dynamo computed for ``node``; ``None`` if there is none."""
    return node.meta.get("example_value")


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a tensor or in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The storages of the results of ``nodes``. A view has the storage of its base."""
    return {t.untyped_storage()._cdata for node in nodes for t in tensors_in(value_of(node))}


def may_share_memory(first: fx.Node, others: Iterable[fx.Node], inputs: set[int]) -> bool:
    """Whether a result of ``first`` may share memory with a result of ``others``.

    ``inputs`` are the storages of the inputs of the graph. Two inputs may overlap in a later call even if they did not
    when the graph was captured.
    """
    mine, theirs = storages([first]), storages(others)
    return bool(mine & theirs) or bool(mine & inputs and theirs & inputs)


# ---- what a node writes ----------------------------------------------------------------------------------------------

_UPDATES_BUFFERS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}
_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
} | {operator.imatmul, operator.iconcat, operator.setitem, operator.delitem}
# Results that share memory with an operand without writing it.
_VIEWS = frozenset(
    (
        *(
            "getitem",
            "getattr",
            "view",
            "view_as",
            "reshape",
            "reshape_as",
            "flatten",
            "unflatten",
            "ravel",
            "transpose",
        ),
        *("t", "adjoint", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "chunk", "split", "tensor_split"),
        *("unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit", "unbind", "narrow", "select", "diagonal"),
        *("squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "unfold", "as_strided", "detach", "alias"),
        *("contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "real", "imag"),
        "dropout",  # in evaluation
    )
)


def _is_inplace(node: fx.Node) -> bool:
    """Whether the call has an argument ``inplace``, by keyword or position, that is not False."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins have no such argument
        return False
    position = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return position < len(node.args) and node.args[position] is not False


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_known_function(target: Any) -> bool:
    """Whether ``target`` is a function of torch or Python's operator module, and has no nested graph."""
    if isinstance(target, HigherOrderOperator):
        return False
    module = getattr(target, "__module__", None) or ""
    described = module.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins")
    return described or inspect.isbuiltin(target) or inspect.ismethoddescriptor(target) or target is getattr


def _schema_writes(node: fx.Node, schema: Any) -> list[fx.Node]:
    written: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        written += [given] if isinstance(given, fx.Node) else []
    return written


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands whose values ``node`` may change."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    operands = node.all_input_nodes
    target: Any = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        schemas = [target._schema] if isinstance(target, OpOverload) else [*target._schemas.values()]
        return [operand for schema in schemas for operand in _schema_writes(node, schema)]
    if node.op == "call_module" or (node.op == "call_function" and not _is_known_function(target)):
        return operands
    if target in _UPDATES_BUFFERS:
        return operands
    name = _name_of(node)
    first = operands[:1]
    if target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")) or _is_inplace(node):
        return operands if "foreach" in name else first
    if node.kwargs.get("out") is not None:
        return [node.kwargs["out"]] if isinstance(node.kwargs["out"], fx.Node) else operands
    # A node that returns the memory of an operand and is not a view may have written it.
    if name not in _VIEWS and storages([node]) & storages(operands):
        return operands
    return []


def changes_context(node: fx.Node) -> bool:
    """Whether ``node`` may change how later nodes run: gradient mode, autocast, hooks or stream.

    Such nodes have no result. A node without a result of a known type counts as one of them.
    """
    if node.op in ("placeholder", "get_attr", "output") or node.target in _IN_PLACE_OPERATORS:
        return False
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
        return True
    numbers = (int, float, bool, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
    known = (Tensor, *numbers, str, torch.Size, torch.dtype, torch.device)

    def is_understood(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return all(map(is_understood, value))
        return isinstance(value, known)

    return not is_understood(value_of(node))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator, by name, in the order of its schema."""
    target: Any = node.target
    schema = (target if isinstance(target, OpOverload) else target.default)._schema
    given: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given[argument.name] = (
            node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
        )
    return given


# ---- what a node computes --------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    F.elu: "elu",
    F.hardswish: "hardswish",
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    F.silu: "silu",
    F.gelu: "gelu",
}
_PARAMETERS = {
    "hardtanh": ("min_val", "max_val"),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "gelu": ("approximate",),
}
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that ``node`` computes from its first operand; ``None`` if it computes none that can be fused."""
    name = _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None or not node.args:
        return None
    names = _PARAMETERS.get(name, ())
    given = dict(zip(names, node.args[1:], strict=False))
    given |= {key: value for key, value in node.kwargs.items() if key in names}
    if name == "gelu":
        approximate = given.get("approximate", "none")
        return {"none": ("gelu", 0.0), "tanh": ("gelu_tanh", 0.0)}.get(str(approximate))
    if not all(isinstance(value, (int, float)) for value in given.values()):
        return None
    if name == "hardtanh":
        limits = given.get("min_val", -1.0), given.get("max_val", 1.0)
        return ("relu6", 0.0) if limits == (0, 6) else None
    return name, float(given.get(names[0], ACTIVATION_PARAMS[name])) if names else 0.0  # type: ignore[arg-type]


def is_addition(node: fx.Node) -> bool:
    """Whether ``node`` is a plain sum of two operands."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return False
    return len(node.args) == 2 and (not node.kwargs or dict(node.kwargs) == {"alpha": 1})


def is_identity(node: fx.Node) -> bool:
    """Whether ``node`` returns its first operand unchanged: dropout in evaluation, or with probability 0."""
    if node.target is not F.dropout or not node.args:
        return False
    names = ("input", "p", "training", "inplace")
    given: dict[str, Any] = {"p": 0.5, "training": True} | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return bool(given["p"] == 0) or given["training"] is False


def producer_overwrites_nothing(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution or linear layer: its result is new, and not saved for backward."""
    convolutions = (torch.conv1d, torch.conv2d, torch.conv3d)
    transposed = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    return node.op == "call_function" and node.target in (*convolutions, *transposed, F.linear)
