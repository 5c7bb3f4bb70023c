"""Private names of torch: without each of them, the wrapper does what it says, or an error names it.

Runs on the fallback too.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import normfused
from normfused import _torch_private, arguments, quantization

FILE = Path(_torch_private.__file__)
OPTIONAL: set[str] = set()  # every name that a test below removes


def removes(*paths: str) -> pytest.MarkDecorator:
    """Run a test once for each path, which the fixture ``lacking`` removes."""
    OPTIONAL.update(paths)
    return pytest.mark.parametrize("lacking", paths, indirect=True)


def remove(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Remove the object at this path, or, if it is a member of a class in C, all members of the class."""
    *owners, name = path.split(".")[1:]
    parent, owner = torch, torch
    for part in owners:
        parent, owner = owner, getattr(owner, part)
    try:
        monkeypatch.delattr(owner, name)
    except (AttributeError, TypeError):
        if not hasattr(owner, name):
            return
        monkeypatch.setattr(parent, owners[-1], type("WithoutMembers", (), {}))


@pytest.fixture
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    remove(monkeypatch, request.param)
    return request.param


def loaded_again() -> ModuleType:
    """A copy of the module, which looks up at import what torch has now."""
    spec = importlib.util.spec_from_file_location("loaded_again", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", _torch_private.REQUIRED)
def test_a_required_name_is_named_when_it_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_again()
    remove(monkeypatch, name)
    with pytest.raises(ImportError, match=re.escape(name.split(".")[-1])) as error:
        loaded_again()
    assert str(error.value).startswith(("normfused uses torch.", "cannot import name"))


@removes("torch._C._is_tracing")
def test_without_it_the_public_function_tells_whether_tracing_is_on(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: "the public function")  # which calls the private one
    assert loaded_again().is_jit_tracing() == "the public function"


@removes("torch.fx._symbolic_trace.is_fx_symbolic_tracing", "torch.fx._symbolic_trace._is_fx_tracing_flag")
def test_without_it_the_other_tells_whether_fx_traces(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.fx._symbolic_trace
    if lacking.endswith("_flag"):
        monkeypatch.setattr(module, "is_fx_symbolic_tracing", lambda: True)
    else:
        monkeypatch.setattr(module, "_is_fx_tracing_flag", True, raising=False)
    assert _torch_private.eager_reason() == "under torch.fx.symbolic_trace"


@removes("torch._assert_async")
def test_without_it_conditions_are_checked_at_once(lacking: str) -> None:
    check = loaded_again().assert_async
    check(torch.tensor(True), "never raised")
    with pytest.raises(RuntimeError, match=r"^the message$"):
        check(torch.tensor(False), "the message")


@removes("torch._C._AutoDispatchBelowAutograd")
def test_without_it_operators_pass_through_autograd(lacking: str) -> None:
    x = torch.ones(2, requires_grad=True)
    with _torch_private.below_autograd():
        y = x * 2
    assert y.tolist() == [2, 2]
    assert y.requires_grad


@removes(
    "torch.distributed.distributed_c10d._resolve_process_group", "torch.distributed.distributed_c10d._get_default_store"
)
def test_a_missing_function_of_process_groups_is_named(lacking: str) -> None:
    use = _torch_private.resolve_process_group if "resolve" in lacking else _torch_private.prefix_store
    with pytest.raises(RuntimeError, match=f"^SyncBatchNorm uses {re.escape(lacking)}, which torch .* does not have$"):
        use("0")


@removes("torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle")
def test_without_ddps_check_nothing_is_patched(lacking: str) -> None:
    def replace(check: Callable[..., Any]) -> Callable[..., Any]:
        raise AssertionError("there is no check to replace")

    _torch_private.patch_ddp_check(replace)
    assert not hasattr(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle")


@removes(
    "torch.ao.quantization.fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD",
    "torch.ao.quantization.quantization_mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS",
)
def test_without_quantizations_tables_nothing_is_registered(lacking: str) -> None:
    assert _torch_private.quantization_tables() is None
    quantization._register()


OPTIONAL |= {"torch.autograd.graph.Node._raw_saved_result"}  # of those nodes that save their result


def test_without_saved_results_backward_refuses_a_tensor_that_was_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = torch.randn(2, 3, 4, requires_grad=True).sigmoid()
    assert _torch_private.saves_its_result(made)
    monkeypatch.setattr(arguments, "saves_its_result", lambda tensor: False)
    y = normfused.functional.batch_norm(made, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@removes("torch.nn.Module._compiled_call_impl")
def test_without_compiled_calls_a_model_is_converted_but_not_captured(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    reason = f"torch {torch.__version__} has no torch.nn.Module._compiled_call_impl"
    assert _torch_private.dynamo_unavailable_reason() == reason
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    converted = normfused.convert(model)
    assert normfused.conversion_report(converted).unavailable_reason == reason
    monkeypatch.undo()  # torch's own call of a module needs the name
    x = torch.randn(2, 3, 4, 4)
    assert isinstance(converted[0], normfused.BatchNorm2d)
    torch.testing.assert_close(converted(x), torch.relu(nn.BatchNorm2d(3)(x)))


@removes("torch._dynamo.lookup_backend")
def test_without_it_a_backend_must_be_a_function(lacking: str) -> None:
    with pytest.raises(RuntimeError, match=r"cannot look up the backend 'inductor': pass the function instead$"):
        _torch_private.lookup_backend("inductor")


@removes("torch._dynamo.exc.SkipFrame")
def test_without_it_a_frame_that_must_not_be_compiled_ends_the_call(lacking: str) -> None:
    error = _torch_private.skip_frame("normfused: cond runs uncompiled")
    assert type(error) is RuntimeError
    assert str(error).startswith("normfused: cond runs uncompiled, which torch ")


@removes("torch._dynamo.utils.counters")
def test_without_it_no_refused_captures_are_counted(lacking: str) -> None:
    assert _torch_private.captures_refused() == 0


class PlainConfig:
    """Dynamo's configuration without the private parts: entries, and the public ``patch``."""

    recompile_limit = 8

    @contextlib.contextmanager
    def patch(self, **changes: int) -> Iterator[None]:
        before = self.recompile_limit
        self.recompile_limit = changes["recompile_limit"]
        assert list(changes) == ["recompile_limit"]
        yield
        self.recompile_limit = before


OPTIONAL |= {"torch._dynamo.config._config"}


def test_without_private_entries_dynamos_configuration_is_patched_publicly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlainConfig()
    monkeypatch.setattr(torch._dynamo, "config", config)
    undo = _torch_private.dynamo_patcher(recompile_limit=64, no_such_entry=1)()
    assert config.recompile_limit == 64
    undo()
    assert config.recompile_limit == 8


def test_dynamos_configuration_is_set_and_restored() -> None:
    before = torch._dynamo.config.verbose
    undo = _torch_private.dynamo_patcher(verbose=not before, no_such_entry=1)()
    assert torch._dynamo.config.verbose is not before
    undo()
    assert torch._dynamo.config.verbose is before


def test_a_torch_without_limits_of_one_function_compiles_with_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, *, backend: (function, backend))
    assert _torch_private.compile_apart(print, repr, 8) == (print, repr)


@removes("torch._decomp.register_decomposition")
def test_without_it_no_decomposition_is_registered(lacking: str) -> None:
    assert _torch_private.register_decomposition(torch.ops.aten.relu.default, "meta")(print) is print


@removes("torch._library.utils.get_layout_constraint_tag")
def test_without_it_inductor_decides_about_an_operator(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    lowering = SimpleNamespace(lowerings={}, make_fallback=made.append)
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", lowering)
    _torch_private.call_from_inductor(torch.ops.aten.relu.default)
    assert made == []


@pytest.mark.parametrize("missing", ["lowerings", "make_fallback", "tag_to_layout_constraint", None])
def test_inductor_is_told_about_an_operator_if_it_can_be(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    lowering = SimpleNamespace(
        lowerings={},
        make_fallback=lambda operator, **options: made.append(operator),
        tag_to_layout_constraint=lambda tag: None,
    )
    if missing is not None:
        delattr(lowering, missing)
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", lowering)
    monkeypatch.setattr(torch._library.utils, "get_layout_constraint_tag", lambda operator: None, raising=False)
    _torch_private.call_from_inductor(torch.ops.aten.relu.default)
    assert made == ([torch.ops.aten.relu.default] if missing in (None, "lowerings") else [])


@removes("torch.utils.data._utils.worker._worker_info")
def test_without_it_a_dataset_counts_as_one_that_asks_for_its_worker(lacking: str) -> None:
    with _torch_private.watched_worker_info() as was_read:
        pass
    assert was_read()


# ---- completeness ----------------------------------------------------------------------------------------------------

# Private by name only: torch.ops resolves operators when they are called, and names a missing one in its error; the
# dictionaries of nn.Module are part of its pickled state; timm's layers have the attribute _fast_norm.
PUBLIC = {"_c10d_functional", "_buffers", "_parameters", "_fast_norm", "_check"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> set[str]:
    """Private attributes, parts of imported modules, and dotted names in strings."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names.update(str(node.module).split("."), (alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            names.update(
                part for alias in node.names if alias.name.startswith("torch") for part in alias.name.split(".")
            )
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "_c10d"):
            names.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return {name for name in names if is_private(name)}


def own_names(tree: ast.AST) -> set[str]:
    """Names that the code defines itself."""
    names: set[str] = {"_asdict", "_fields", "_make", "_replace", "_getframe"}  # of namedtuple and sys
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_every_private_name_of_torch_is_required_or_removed_by_a_test() -> None:
    tree = ast.parse(FILE.read_text())
    known = {part for path in (*_torch_private.REQUIRED, *OPTIONAL) for part in path.split(".") if is_private(part)}
    stored = {"_worker_info", "_compiled_call_impl", "_passing_sync_batchnorm_handle"}  # torch's, replaced here
    used = private_names(tree) - (own_names(tree) - stored)
    assert used <= known, "neither in REQUIRED nor removed by a test"


def test_no_other_module_uses_private_names_of_torch() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILE.parent.rglob("*.py") if path != FILE}
    own = set().union(*map(own_names, trees.values()))
    allowed = own | PUBLIC | {part for path in _torch_private.REQUIRED for part in path.split(".")}
    found = {(path.name, name) for path, tree in trees.items() for name in private_names(tree) - allowed}
    assert found == set()
