"""Fusion of layer norms and RMS norms with the addition before them, in a captured graph.

A transformer adds the result of a layer to the residual stream, and normalizes the sum. The operator
``normfused::layer_norm`` does both, and returns the sum too, which the stream goes on with.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfused.conversion import graph as g

DESCRIPTION = "add before"


def calls_layer_norm(node: fx.Node) -> bool:
    """Whether ``node`` calls the operator."""
    packet = torch.ops.normfused.layer_norm
    return node.op == "call_function" and node.target in (packet, packet.default)


def fuse_addition(node: fx.Node, inputs: set[int]) -> str | None:
    """Fuse the norm that ``node`` calls with the addition of its input. Returns the reason if it cannot.

    ``inputs`` are the storages of the inputs of the graph.
    """
    given = g.arguments_of(node)
    addition = given["input"]
    if given["residual"] is not None:
        return "the call already has a residual"
    if not isinstance(addition, fx.Node) or not g.is_addition(addition):
        return "its input is no sum"
    reason = _blocker(addition, node, inputs)
    if reason is None:
        _rewrite(addition, node, given)
    return reason


def _blocker(addition: fx.Node, node: fx.Node, inputs: set[int]) -> str | None:
    """Why adding at the place of the norm would change results; ``None`` if it would not."""
    if addition.target is operator.iadd or addition.target == "add_":
        return "the sum is written over an addend"
    addends: list[Any] = [g.value_of(a) if isinstance(a, fx.Node) else None for a in addition.args]
    total = g.value_of(addition)
    if not all(isinstance(value, Tensor) for value in (*addends, total)):
        return "an addend is no tensor"
    for value in addends:
        if type(value) is not type(total) and not isinstance(value, torch.nn.Parameter):
            return "the tensors have different classes"
        if value.dtype != total.dtype or value.device != total.device:
            return "the addends have different dtypes or devices"
        if len(value.shape) != len(total.shape) or not all(
            statically_known_true(a == b) for a, b in zip(value.shape, total.shape, strict=True)
        ):
            return "the addends have different shapes"
    operands = [a for a in addition.args if isinstance(a, fx.Node)]
    between = addition.next
    while between is not node:
        if addition in between.all_input_nodes:
            return "the sum is used before the norm"
        if any(g.may_share_memory(written, operands, inputs) for written in g.written_by(between)):
            return "an addend is changed in between"
        if g.changes_context(between):
            return f"{g._name_of(between)} runs in between"
        between = between.next
    after = node.next
    while after.op != "output":
        if any(g.may_share_memory(written, [addition], set()) for written in g.written_by(after)):
            return "the sum is changed later"
        after = after.next
    return None


def _rewrite(addition: fx.Node, node: fx.Node, given: dict[str, Any]) -> None:
    """Replace both by one call, at the place of the norm."""
    first, second = addition.args
    with node.graph.inserting_before(node):
        call = node.graph.call_function(
            torch.ops.normfused.layer_norm, (), given | {"input": first, "residual": second}
        )
        total = node.graph.call_function(operator.getitem, (call, 1))
    call.meta, total.meta = {**node.meta}, {**addition.meta}
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
    addition.replace_all_uses_with(total)
    node.graph.erase_node(addition)
