"""torch's OpInfo and ModuleInfo tests, run with our functions.

A case is a generator (a kind of test), an operator and a dtype. It runs on every sample that torch has for the
operator. Torch's function and ours must agree on each sample: both pass, that is, their values are those of the
definition, or both fail. `suite_differences.py` lists the exceptions with their reason. A listed exception that does
not occur fails.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from definitions import DEFINITIONS, SINGLE
from suite_differences import ALL, DIFFERENCES, MODULE_DIFFERENCES, OTHER_DTYPES, Difference
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import normfused
from normfused.functional import batch_norm, group_norm, instance_norm, layer_norm, local_response_norm, rms_norm

suites = pytest.importorskip("torch.testing._internal.common_methods_invocations")
modules = pytest.importorskip("torch.testing._internal.common_modules")
compliance = pytest.importorskip("torch.testing._internal.composite_compliance")

pytestmark = pytest.mark.usefixtures("needs_extension")

Function = Callable[..., Any]
DOUBLE = (torch.float64,)
OURS: dict[Function, Function] = {
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.local_response_norm: local_response_norm,
    F.rms_norm: rms_norm,
}
OPS = {info.name: info for info in suites.op_db if info.op in OURS and not info.variant_test_name}
MODULES = {
    info.module_cls.__name__: info
    for info in modules.module_db
    if info.module_cls.__module__.endswith(("batchnorm", "instancenorm", "normalization"))
    and info.module_cls.__name__ in normfused.__all__
}


# ---- generators of operators -----------------------------------------------------------------------------------------
# Each computes values from a function of the differentiable arguments and from these arguments.


def weighted(results: Any) -> Tensor:
    """A sum whose gradient depends on each element."""
    return sum(
        (r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape)).square().sum()
        for r in tree_leaves(results)
    )


def gradients(f: Function, v: list[Tensor]) -> Any:
    leaves = [t.detach().requires_grad_() for t in v]
    return torch.autograd.grad(weighted(f(*leaves)), leaves)


def double_gradients(f: Function, v: list[Tensor]) -> Any:
    leaves = [t.detach().requires_grad_() for t in v]
    first = torch.autograd.grad(weighted(f(*leaves)), leaves, create_graph=True)
    return torch.autograd.grad(weighted(first), leaves, materialize_grads=True, allow_unused=True)


def tangents(v: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple((3 * t + 1).cos() for t in v)


def vjp(f: Function, v: list[Tensor]) -> Any:
    y, pullback = torch.func.vjp(f, *v)
    return y, pullback(y.detach().cos())


def jvp(f: Function, v: list[Tensor]) -> Any:
    return torch.func.jvp(f, tuple(v), tangents(v))


def of(outer: Function, inner: Function) -> Function:
    """A transform of a transform, nested as in torch's functorch suite."""

    def nested(f: Function, v: list[Tensor]) -> Any:
        return outer(lambda *w: weighted(inner(f, list(w))), v)

    return nested


def vmap(f: Function, v: list[Tensor], dim: int = 0) -> Any:
    return torch.func.vmap(f, in_dims=dim)(*(torch.stack([t, t.cos(), 2 * t], dim) for t in v))


def over_batches(f: Function) -> Function:
    return lambda *v: torch.func.vmap(f)(*(torch.stack([t, t.sin()]) for t in v))


def vmap_of(inner: Function) -> Function:
    return lambda f, v: vmap(lambda *w: inner(f, list(w)), v)


def batched_gradients(f: Function, v: list[Tensor]) -> Any:
    leaves = [t.detach().requires_grad_() for t in v]
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, torch.stack([y.detach().cos(), y.detach()]), is_grads_batched=True)


def with_gradients(change: Function) -> Function:
    """Output and gradients for inputs with another memory layout."""

    def generator(f: Function, v: list[Tensor]) -> Any:
        changed = [change(t.detach()) for t in v]
        return f(*changed), gradients(f, changed)

    return generator


def noncontiguous(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def jacobian(strategy: str) -> Function:
    return lambda f, v: torch.autograd.functional.jacobian(f, tuple(v), vectorize=True, strategy=strategy)


def traced(f: Function, v: list[Tensor]) -> Any:
    def forward_and_backward(*v: Tensor) -> Any:
        return torch.func.vjp(f, *v)[1](f(*v))

    return make_fx(forward_and_backward, tracing_mode="real")(*v)(*v)


def unchanged_arguments(f: Function, v: list[Tensor]) -> Any:
    """The arguments keep their values and versions."""
    given = [t.clone() for t in v]
    versions = [t._version for t in given]
    f(*given)
    assert [t._version for t in given] == versions
    return given


VALUES: dict[str, tuple[Function, tuple[torch.dtype, ...]]] = {
    "forward": (lambda f, v: f(*v), ALL),
    "gradients": (gradients, ALL),
    "double gradients": (double_gradients, SINGLE),
    "arguments are not changed": (unchanged_arguments, ALL),
    "non-contiguous": (with_gradients(noncontiguous), ALL),
    "transposed": (with_gradients(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)), SINGLE),
    "neg view": (with_gradients(lambda t: torch._neg_view(-t)), ALL),
    "inference mode": (torch.inference_mode()(lambda f, v: f(*v)), ALL),
    "make_fx": (traced, SINGLE),
    "functionalize": (lambda f, v: torch.func.functionalize(f)(*v), SINGLE),
    "functionalize of vjp": (lambda f, v: torch.func.functionalize(lambda *w: vjp(f, list(w)))(*v), SINGLE),
    "vjp": (vjp, SINGLE),
    "jvp": (jvp, SINGLE),
    "vmap": (vmap, SINGLE),
    "vmap, last dim": (functools.partial(vmap, dim=-1), SINGLE),
    "vmap of vjp": (vmap_of(vjp), SINGLE),
    "vmap of jvp": (vmap_of(jvp), SINGLE),
    "vmap of vjp of vjp": (vmap_of(of(vjp, vjp)), DOUBLE),
    "vjp of vjp": (of(vjp, vjp), DOUBLE),
    "jvp of vjp": (of(jvp, vjp), DOUBLE),
    "vjp of jvp": (of(vjp, jvp), DOUBLE),
    "jvp of jvp": (of(jvp, jvp), DOUBLE),
    "vjp of vmap": (lambda f, v: vjp(over_batches(f), v), DOUBLE),
    "jvp of vmap": (lambda f, v: jvp(over_batches(f), v), DOUBLE),
    "jvp of vjp of vmap": (lambda f, v: of(jvp, vjp)(over_batches(f), v), DOUBLE),
    "jvp of vmap of vjp": (lambda f, v: jvp(lambda *w: vmap_of(vjp)(f, list(w)), v), DOUBLE),
    "batched gradients": (batched_gradients, SINGLE),
    "jacobian, reverse": (jacobian("reverse-mode"), DOUBLE),
    "jacobian, forward": (jacobian("forward-mode"), DOUBLE),
}

# ---- torch's checks, which raise if something is wrong ---------------------------------------------------------------


def assert_equal(a: Any, e: Any, **options: Any) -> None:
    torch.testing.assert_close(a, e, **options)


CHECKS: dict[str, Function] = {
    "gradcheck": lambda f, v, _: torch.autograd.gradcheck(f, v, check_batched_grad=True, fast_mode=True),
    "gradcheck, forward mode": lambda f, v, _: torch.autograd.gradcheck(
        f, v, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True, fast_mode=True
    ),
    "gradcheck, forward mode of undefined tangents": lambda f, v, _: torch.autograd.gradcheck(
        f, v, check_forward_ad=True, check_undefined_grad=True, fast_mode=True
    ),
    "gradgradcheck": lambda f, v, _: torch.autograd.gradgradcheck(f, v, check_batched_grad=True, fast_mode=True),
    "gradgradcheck, forward over reverse": lambda f, v, _: torch.autograd.gradgradcheck(
        f, v, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False, fast_mode=True
    ),
    "composite compliance, mode": lambda f, _, call: compliance.check_with_mode(*call, assert_equal),
    "composite compliance, subclass": lambda f, _, call: compliance.check_all_permutations(*call, assert_equal),
    "composite compliance, backward": lambda f, _, call: compliance.check_backward_formula(
        *call, assert_equal_fn=assert_equal
    ),
    "composite compliance, forward mode": lambda f, _, call: compliance.check_forward_ad_formula(
        *call, assert_equal_fn=assert_equal
    ),
}

MANY_PERMUTATIONS = ("composite compliance, backward", "composite compliance, forward mode")

# ---- running a case --------------------------------------------------------------------------------------------------

Outcome = tuple[bool, bool, str, Any]  # whether torch passed, whether normfused passed, what is wrong, the sample


def of_differentiable(function: Function, sample: Any) -> tuple[Function, list[Tensor]]:
    """A function of the arguments that require grad, and these arguments."""
    flat, spec = tree_flatten((sample.input, *sample.args))
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]

    def call(*values: Tensor) -> Tensor:
        given = list(flat)
        for place, value in zip(places, values, strict=True):
            given[place] = value
        return function(*tree_unflatten(given, spec), **sample.kwargs)

    return call, [flat[place].detach() for place in places]


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    torch.manual_seed(0)
    try:
        return call(), None
    except Exception as error:
        return None, error


def fresh(sample: Any) -> Any:
    """A copy of the sample, because training updates its buffers."""

    def copied(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return copy.copy(sample).transform(copied)


def values_of(function: Function, generator: str, dtype: torch.dtype, sample: Any) -> Any:
    sample = fresh(sample)
    f, values = of_differentiable(function, sample)
    if generator in CHECKS:
        leaves = tuple(v.clone().requires_grad_() for v in values)
        CHECKS[generator](f, leaves, (function, (sample.input, *sample.args), sample.kwargs))
        return None, None
    if generator == "dtypes":
        return function(sample.input, *sample.args, **sample.kwargs), None
    return VALUES[generator][0](f, values), [t for t in sample.args if isinstance(t, Tensor) and not t.requires_grad]


@functools.cache
def outcomes(generator: str, name: str, dtype: torch.dtype) -> list[Outcome]:
    info = OPS[name]
    requires_grad = generator != "dtypes"
    found: list[Outcome] = []
    torch.manual_seed(0)
    try:
        samples = list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    except Exception:  # torch has no samples of this dtype
        return []
    if generator in MANY_PERMUTATIONS:
        samples = samples[:2]  # one in training, one in evaluation
    for sample in samples:
        functions = (info.op, OURS[info.op], DEFINITIONS[info.op])
        (theirs, their_error), (ours, our_error), (truth, _) = (
            attempt(functools.partial(values_of, function, generator, dtype, sample)) for function in functions
        )
        truth = next((value for value in (truth, theirs, ours) if value is not None), (None, None))
        our_fault = f"{our_error!r:.400}" if our_error else disagreement(ours[0], truth[0], dtype)
        slack = 1.0 if our_fault else SLACK_OF_TORCH
        their_fault = f"{their_error!r:.400}" if their_error else disagreement(theirs[0], truth[0], dtype, slack)
        if not (our_fault or their_fault):
            our_fault = disagreement(ours[1], theirs[1], dtype)  # the buffers
        found.append((not their_fault, not our_fault, f"torch: {their_fault}; ours: {our_fault}", sample))
    return found


TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-2, torch.bfloat16: 2e-1}
SLACK_OF_TORCH = 10.0  # where ours pass: torch's results in float32 may be less accurate than what ours must be


def largest(t: Tensor) -> float:
    finite = t.double()[t.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def disagreement(got: Any, expected: Any, dtype: torch.dtype, slack: float = 1.0) -> str:
    """The first difference, or an empty string. The tolerance is relative to the largest of all values."""
    got, expected = tree_leaves(got), tree_leaves(expected)
    if len(got) != len(expected):
        return f"{len(got)} results instead of {len(expected)}"
    scale = max([1.0, *(largest(e) for e in expected if isinstance(e, Tensor))])
    for a, e in zip(got, expected, strict=True):
        if not isinstance(e, Tensor):
            if a != e:
                return f"{a} instead of {e}"
            continue
        tolerance = slack * max(TOLERANCES.get(dtype, 0.0), TOLERANCES.get(e.dtype, 0.0))
        try:
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        except AssertionError as error:
            return str(error)
    return ""


def dtypes_of_generators() -> dict[str, tuple[torch.dtype, ...]]:
    return {
        **{name: dtypes for name, (_, dtypes) in VALUES.items()},
        **dict.fromkeys(CHECKS, DOUBLE),
        "dtypes": (*ALL, *OTHER_DTYPES),
    }


def cases() -> Iterator[Any]:
    for generator, dtypes in dtypes_of_generators().items():
        for name in OPS:
            for dtype in dtypes:
                short = str(dtype).removeprefix("torch.")
                yield pytest.param(generator, name, dtype, id=f"{generator}-{name.split('.')[-1]}-{short}")


def judge(generator: str, name: str, dtype: torch.dtype, found: list[Outcome], differences: list[Difference]) -> None:
    for theirs, ours, wrong, sample in found:
        listed = [d for d in differences if d.matches(generator, name, dtype, sample)]
        if listed:
            (difference,) = listed
            assert (theirs, ours) == (difference.torch_passes, not difference.torch_passes), (
                f"no longer differs: {difference.reason}: {sample}"
            )
        else:
            assert theirs == ours, f"{wrong}: {sample}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("generator", "name", "dtype"), list(cases()))
def test_operator(generator: str, name: str, dtype: torch.dtype) -> None:
    judge(generator, name, dtype, outcomes(generator, name, dtype), DIFFERENCES)


# ---- modules ---------------------------------------------------------------------------------------------------------


def made(cls: type[nn.Module], sample: Any, dtype: torch.dtype, training: bool) -> nn.Module:
    """A module with the sample's constructor arguments and random parameters."""
    factory = {} if issubclass(cls, nn.LocalResponseNorm) else {"device": "cpu", "dtype": dtype}
    module = cls(*sample.constructor_input.args, **sample.constructor_input.kwargs, **factory).train(training)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def module_gradients(module: nn.Module, x: Tensor) -> Any:
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    y = module(leaves[0])
    first = torch.autograd.grad(weighted(y), leaves, create_graph=True)
    second = torch.autograd.grad(weighted(first), leaves, allow_unused=True, materialize_grads=True)
    return y, first, second, module.state_dict()


def module_gradcheck(check: Function, **options: Any) -> Function:
    def generator(module: nn.Module, x: Tensor) -> None:
        module = module.double()
        names = [name for name, _ in module.named_parameters()]

        def f(x: Tensor, *parameters: Tensor) -> Tensor:
            state = {**dict(zip(names, parameters, strict=True)), **{n: b.clone() for n, b in module.named_buffers()}}
            return torch.func.functional_call(module, state, (x,))

        check(f, (x.detach().double().requires_grad_(), *module.parameters()), fast_mode=True, **options)

    return generator


def channels_last(module: nn.Module, x: Tensor) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats:
        return module(x)
    x = x.detach().contiguous(memory_format=formats[x.dim()]).requires_grad_()
    y = module.to(memory_format=formats[x.dim()])(x)
    (grad,) = torch.autograd.grad(weighted(y), x)
    if not isinstance(module, nn.LocalResponseNorm):  # torch's preserves neither format
        assert y.is_contiguous(memory_format=formats[x.dim()])
    return y, grad


def loaded(module: nn.Module, x: Tensor) -> Any:
    other = copy.deepcopy(module)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.detach().zero_()
    other.load_state_dict(module.state_dict())
    return other(x), other.state_dict()


def emptied(module: nn.Module, x: Tensor) -> Any:
    state = copy.deepcopy(module.state_dict())
    other = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    other.load_state_dict(state)
    return other(x)


def in_both_modes(module: nn.Module, x: Tensor) -> Any:
    return [module.train(mode)(x) for mode in (True, False, True)], module.training


MODULE_GENERATORS: dict[str, tuple[Function, tuple[torch.dtype, ...]]] = {
    "forward": (lambda m, x: (m(x), m(x), m.state_dict()), ALL),
    "gradients": (module_gradients, SINGLE),
    "gradcheck": (module_gradcheck(torch.autograd.gradcheck, check_forward_ad=True), DOUBLE),
    "gradgradcheck": (module_gradcheck(torch.autograd.gradgradcheck), DOUBLE),
    "non-contiguous": (lambda m, x: module_gradients(m, noncontiguous(x.detach())), SINGLE),
    "memory format": (channels_last, ALL),
    "pickle": (lambda m, x: pickle.loads(pickle.dumps(m))(x), SINGLE),
    "deepcopy": (lambda m, x: copy.deepcopy(m)(x), SINGLE),
    "state_dict": (loaded, SINGLE),
    "to_empty": (emptied, SINGLE),
    "train and eval": (in_both_modes, SINGLE),
    "repr": (lambda m, x: repr(m), SINGLE),
    "float()": (lambda m, x: m.float()(x.float()), ALL),
    "jit.trace": (lambda m, x: torch.jit.trace(m, x, check_trace=False)(x), DOUBLE),
    "fx": (lambda m, x: torch.fx.symbolic_trace(nn.Sequential(m))(x), DOUBLE),
}


def raises_as_listed(cls: type[nn.Module], sample: Any, dtype: torch.dtype, training: bool) -> None:
    module = made(cls, sample.module_error_input, dtype, training)
    _, error = attempt(functools.partial(module, *sample.module_error_input.forward_input.args))
    assert isinstance(error, sample.error_type), f"raised {error!r}"
    assert "eps must be" in str(error)  # torch's pattern continues with torch's wording


@functools.cache
def module_outcomes(generator: str, name: str, dtype: torch.dtype, training: bool) -> list[Outcome]:
    info = MODULES[name]
    make = info.module_error_inputs_func if generator == "errors" else info.module_inputs_func
    torch.manual_seed(0)
    samples = make(info, "cpu", dtype, requires_grad=generator != "errors", training=training) if make else []

    def run(cls: type[nn.Module], sample: Any) -> Any:
        if generator == "errors":
            return raises_as_listed(cls, sample, dtype, training)
        return MODULE_GENERATORS[generator][0](made(cls, sample, dtype, training), *sample.forward_input.args)

    found: list[Outcome] = []
    for sample in samples:
        (expected, theirs), (got, ours) = (
            attempt(functools.partial(run, cls, sample)) for cls in (info.module_cls, getattr(normfused, name))
        )
        wrong = f"{ours!r:.400}" if ours is not None else ""
        if theirs is None and ours is None:
            wrong = disagreement(got, expected, dtype)
        found.append((theirs is None, not wrong, f"torch: {theirs!r:.400}; ours: {wrong}", sample))
    return found


def mode_of(name: str, training: bool) -> str:
    return f"{name} {'training' if training else 'eval'}"


def module_cases() -> Iterator[Any]:
    dtypes_of = {**{g: dtypes for g, (_, dtypes) in MODULE_GENERATORS.items()}, "errors": DOUBLE}
    for generator, dtypes in dtypes_of.items():
        for name in MODULES:
            for dtype in dtypes:
                for training in (True, False):
                    short = f"{str(dtype).removeprefix('torch.')}-{'training' if training else 'eval'}"
                    yield pytest.param(generator, name, dtype, training, id=f"{generator}-{name}-{short}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("generator", "name", "dtype", "training"), list(module_cases()))
def test_module(generator: str, name: str, dtype: torch.dtype, training: bool) -> None:
    found = module_outcomes(generator, name, dtype, training)
    judge(generator, mode_of(name, training), dtype, found, MODULE_DIFFERENCES)


# ---- summary ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_table(record_property: Callable[[str, object], None]) -> None:
    """Tabulates the samples of each generator. Every listed difference must occur."""
    counts: dict[str, Counter[str]] = {}
    met: Counter[str] = Counter()
    operators = [(f"op: {c.values[0]}", c.values[:3], outcomes(*c.values), DIFFERENCES) for c in cases()]
    modules = [
        (f"module: {g}", (g, mode_of(name, training), d), module_outcomes(g, name, d, training), MODULE_DIFFERENCES)
        for g, name, d, training in (case.values for case in module_cases())
    ]
    for row, case, found, differences in (*operators, *modules):
        count = counts.setdefault(row, Counter())
        for theirs, ours, _, sample in found:
            count.update(run=1, torch=theirs, ours=ours, differences=theirs != ours)
            met.update(d.reason for d in differences if d.matches(*case, sample))
    assert all(met[d.reason] for d in (*DIFFERENCES, *MODULE_DIFFERENCES))
    assert all(counts[row]["run"] for row in counts)
    lines = [f"{'generator':58}{'run':>6}{'torch':>7}{'ours':>7}{'differences':>13}"]
    total: Counter[str] = Counter()
    for count in counts.values():
        total.update(count)
    for row, count in [*counts.items(), ("all", total)]:
        lines.append(f"{row:58}" + f"{count['run']:6}{count['torch']:7}{count['ours']:7}{count['differences']:13}")
    lines += [f"{met[d.reason]:6} samples: {d.reason}" for d in (*DIFFERENCES, *MODULE_DIFFERENCES)]
    record_property("table", "\n".join(lines))
