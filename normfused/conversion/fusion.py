"""The compiler backend ``"normfused"``: fuses the norms of a captured graph with the operations next to them.

In Dynamo's graph a batch norm is a call of ``normfused::batch_norm_training`` or ``batch_norm_inference``, and a group
or instance norm one of ``normfused::group_norm``, followed by ``getitem`` 0, and possibly by an addition and an
activation. These become arguments of the call. Layer norms are fused with the addition before them. Other nodes do not
change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfused import _extension
from normfused._torch_private import HigherOrderOperator, lookup_backend, skip_frame
from normfused.conversion import additions
from normfused.conversion import graph as g

# For each layer, see layer_of(): the fused operations and True, or the reason against fusion and False.
Outcomes = dict[int | None, tuple[str, bool]]

_BATCH_NORMS = ("batch_norm_training", "batch_norm_inference")
_OPERATORS = (*_BATCH_NORMS, "group_norm")
_STATE = ("running_mean", "running_var", "num_batches_tracked", "nonfinite_batches")


class Match(NamedTuple):
    """The nodes that can be fused with a norm."""

    chain: list[fx.Node]  # from the call of the operator to the last node that it replaces
    residual: fx.Node | None
    activation: g.Activation

    def describe(self) -> str:
        """``"add + relu"``."""
        words = ["add"] if self.residual is not None else []
        words += [self.activation[0]] if self.activation[0] != "identity" else []
        return " + ".join(words)


def backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Fuse the norms of ``gm`` and return a function that runs it.

    It is the backend of ``torch.compile(model, backend="normfused")``.

    Args:
        gm, example_inputs: a graph that Dynamo has captured, which is changed, and its inputs.
        options: ``{"then": name}`` passes the rewritten graph to another backend, such as ``"inductor"``; by default
            its nodes run one by one, with eager autograd. ``{"inplace": True}``: as in :func:`normfused.convert`.

    Raises:
        ValueError: an unknown option.
    """
    options = dict(options or {})
    then, inplace = options.pop("then", None), bool(options.pop("inplace", False))
    if options:
        raise ValueError(f"normfused backend: unknown option {next(iter(options))!r}; known are 'then' and 'inplace'")
    if then is None:
        check_is_flat(gm)
    fuse(gm, inplace)
    if then is None:
        run_directly(gm)
        return gm.forward
    lookup = lookup_backend(then) if isinstance(then, str) else then
    compiled: Callable[..., Any] = lookup(gm, example_inputs)
    return compiled


def check_is_flat(gm: fx.GraphModule) -> None:
    """Have Dynamo run the frame uncompiled if parts of it would become nested graphs.

    Checkpointing and Python's ``autograd.Function`` become nested graphs. What they do depends on how they run the
    user's function, so they run eagerly. Dynamo still captures the frames that they call.

    Raises:
        SkipFrame: the graph has a nested graph.
    """
    nested = next((n for n in gm.graph.nodes if isinstance(n.target, HigherOrderOperator)), None)
    if nested is not None:
        raise skip_frame(f"normfused: {nested.target} runs uncompiled")


def fuse(gm: fx.GraphModule, inplace: bool) -> Outcomes:
    """Fuse the norms of ``gm`` in place. Returns the outcome for each layer, see :func:`layer_of`."""
    outcomes: Outcomes = {}
    inputs = g.storages(node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr"))
    for node in list(gm.graph.nodes):
        if additions.calls_layer_norm(node):
            layer = layer_of(node)
            reason = additions.fuse_addition(node, inputs)
            if reason is not None or outcomes.get(layer, ("", True))[1]:  # a layer may be called more than once
                outcomes[layer] = (reason or additions.DESCRIPTION, reason is None)
        if operator_of(node) is None:
            continue
        layer, match = layer_of(node), what_follows(node)
        before = outcomes.get(layer)  # not None if the layer is called more than once
        reason = match if isinstance(match, str) else _fusion_blocker(match, inputs)
        if isinstance(match, str) or reason is not None:
            outcomes[layer] = (reason or "", False)
            continue
        over_input = inplace and may_write_over_input(match)
        text = match.describe() + (", in place" if over_input else "")
        if before is None or (before[1] and before[0] != text):
            outcomes[layer] = (text if before is None else f"{before[0]}; {text}", True)
        rewrite(match, over_input)
    gm.graph.lint()
    gm.recompile()
    return outcomes


def operator_of(node: fx.Node) -> str | None:
    """The name of the operator with an addition and an activation that ``node`` calls; ``None`` if it calls none."""
    if node.op != "call_function":
        return None
    for name in _OPERATORS:
        packet = getattr(torch.ops.normfused, name)
        if node.target is packet or node.target is packet.default:
            return name
    return None


def layer_of(node: fx.Node) -> int | None:
    """The ``id`` of the module that called the operator, as Dynamo records it; ``None`` if it does not."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    key = next(reversed(stack)).split("@")[0]  # the text after @ is the number of the call
    return int(key) if key.isdigit() else None


# ---- finding ---------------------------------------------------------------------------------------------------------


def _single_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def what_follows(node: fx.Node) -> Match | str:
    """The nodes that can be fused with the norm that ``node`` calls, or the reason why there are none."""
    given = g.arguments_of(node)
    if given["residual"] is not None or given["activation"] != "identity":
        return "the call already has an activation or residual"
    output = _single_user(node)
    if output is None or output.target is not operator.getitem or output.args[1] != 0:
        return "its statistics are used too"
    chain = [node, output]
    if (after := _skip_identities(chain)) is None:
        return _why_not_single(chain[-1])
    activation = g.activation_of(after)
    if activation is not None:
        return Match([*chain, after], None, activation)
    if operator_of(after) is not None and g.arguments_of(after)["residual"] is chain[-1]:
        return "it is the residual of another norm"
    if not g.is_addition(after):
        return f"it is followed by {g._name_of(after)}" if after.op != "output" else "its output leaves the graph"
    first, second = after.args
    residual = second if first is chain[-1] else first
    if not isinstance(residual, fx.Node) or residual is chain[-1]:
        return "the addend is not another tensor"
    if residual is first and (after.target is operator.iadd or after.target == "add_"):
        return "it is added in place to another tensor"
    chain.append(after)
    if (last := _skip_identities(chain)) is not None and (activation := g.activation_of(last)) is not None:
        return Match([*chain, last], residual, activation)
    return Match(chain, residual, ("identity", 0.0))


def _skip_identities(chain: list[fx.Node]) -> fx.Node | None:
    """The only user of the last node of ``chain`` after appending identities to ``chain``; ``None`` if not single."""
    while (user := _single_user(chain[-1])) is not None and g.is_identity(user):
        chain.append(user)
    return user


def _why_not_single(node: fx.Node) -> str:
    return "its output is used more than once" if node.users else "its output is not used"


def _fusion_blocker(match: Match, inputs: set[int]) -> str | None:
    """Why computing ``match`` at the place of its last node would change results; ``None`` if it would not."""
    node, last = match.chain[0], match.chain[-1]
    given = g.arguments_of(node)
    source = g.value_of(given["input"])
    for other in (g.value_of(last), *([g.value_of(match.residual)] if match.residual is not None else [])):
        if type(other) is not type(source) and not isinstance(source, torch.nn.Parameter):
            return "the tensors have different classes"
        if not isinstance(other, Tensor) or other.dtype != source.dtype or other.device != source.device:
            return "the addend has another dtype or device"
        if len(other.shape) != len(source.shape) or not all(
            statically_known_true(a == b) for a, b in zip(other.shape, source.shape, strict=True)
        ):
            return "the addend has another shape"
    operands = [value for value in (*given.values(), match.residual) if isinstance(value, fx.Node)]
    state = [given[name] for name in _STATE if isinstance(given.get(name), fx.Node)]
    between = node.next
    while between is not last:
        if between not in match.chain:
            if _writes(between, operands, inputs):
                return "its operands are changed in between"
            if any(g.may_share_memory(read, state, set()) for read in between.all_input_nodes):
                return "its running statistics are used in between"
            if g.changes_context(between):
                return f"{g._name_of(between)} runs in between"
        between = between.next
    saves_residual = match.residual is not None and match.activation[0] not in ("identity", "relu", "leaky_relu")
    if saves_residual and _is_written_after(match.residual, last, inputs):
        return "the addend is changed later"
    return None


def _writes(node: fx.Node, values: list[fx.Node], inputs: set[int]) -> bool:
    """Whether ``node`` may change one of ``values``."""
    # A batch norm writes its running statistics only. They overlap with other inputs in later calls only if they did
    # when the graph was captured.
    may_overlap = set() if operator_of(node) is not None else inputs
    return any(g.may_share_memory(written, values, may_overlap) for written in g.written_by(node))


def _is_written_after(value: Any, last: fx.Node, inputs: set[int]) -> bool:
    node = last.next
    while node.op != "output":
        if _writes(node, [value], inputs):
            return True
        node = node.next
    return False


def may_write_over_input(match: Match) -> bool:
    """Whether the output may be written over the input.

    Nothing else may read the input, and nothing may overwrite the output.
    """
    name, parameter = match.activation
    source = g.arguments_of(match.chain[0])["input"]
    if operator_of(match.chain[0]) not in _BATCH_NORMS:
        return False
    if match.residual is not None or name != "leaky_relu" or parameter <= 0 or len(source.users) != 1:
        return False
    return g.producer_overwrites_nothing(source) and not _is_written_after(match.chain[-1], match.chain[-1], set())


# ---- rewriting -------------------------------------------------------------------------------------------------------


def rewrite(match: Match, over_input: bool) -> None:
    """Replace the nodes of ``match`` by one call, at the place of the last."""
    node, last = match.chain[0], match.chain[-1]
    given = g.arguments_of(node)
    given |= {"activation": match.activation[0], "activation_param": match.activation[1], "residual": match.residual}
    if over_input:
        _call_in_place(node, given, before=last)
        output = given["input"]
    else:
        with node.graph.inserting_before(last):
            call = node.graph.call_function(getattr(torch.ops.normfused, operator_of(node) or ""), (), given)
            output = node.graph.call_function(operator.getitem, (call, 0))
        call.meta, output.meta = {**node.meta}, {**last.meta}
    last.replace_all_uses_with(output)
    for replaced in reversed(match.chain):
        node.graph.erase_node(replaced)


def run_directly(gm: fx.GraphModule) -> None:
    """Replace calls made for compilers by direct calls, in a graph whose nodes run one by one."""
    for node in list(gm.graph.nodes):
        if operator_of(node) is None and not additions.calls_layer_norm(node):
            continue
        if not _write_in_place(node) and _extension.C is not None:
            _call_kernel(node)
    gm.graph.lint()
    gm.recompile()


def _write_in_place(node: fx.Node) -> bool:
    """Call the in-place operator if the graph clones the input and copies the output over it. Returns whether it did.

    While compiling, a layer with ``inplace=True`` records such a clone and copy.
    """
    if operator_of(node) not in _BATCH_NORMS:
        return False
    given, output = g.arguments_of(node), _single_user(node)
    clone: fx.Node = given["input"]
    copy = None if output is None else _single_user(output)
    if output is None or copy is None or copy.target != "copy_" or clone.target != "clone" or len(clone.users) != 1:
        return False
    input: Any = clone.args[0]
    if copy.args != (input, output):
        return False
    _call_in_place(node, given | {"input": input}, before=copy)
    copy.replace_all_uses_with(input)
    for replaced in (copy, output, node, clone):
        node.graph.erase_node(replaced)
    return True


def _call_in_place(node: fx.Node, given: dict[str, Any], before: fx.Node) -> None:
    packet = getattr(torch.ops.normfused, f"{operator_of(node)}_")
    arguments = {argument.name: given[argument.name] for argument in packet.default._schema.arguments}
    with node.graph.inserting_before(before):
        node.graph.call_function(packet, (), arguments)


def _call_kernel(node: fx.Node) -> None:
    """Call the extension directly if only the output is used, which avoids the overhead of ``torch.ops``."""
    output = _single_user(node)
    if output is None or output.target is not operator.getitem or output.args[1] != 0:
        return
    kernel = getattr(_extension.C, operator_of(node) or "layer_norm")
    with node.graph.inserting_before(node):
        call = node.graph.call_function(kernel, tuple(g.arguments_of(node).values()))
    call.meta = {**output.meta}
    output.replace_all_uses_with(call)
    node.graph.erase_node(output)
    node.graph.erase_node(node)
