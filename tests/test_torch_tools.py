"""torch's tools treat our layers like torch.nn's, or raise if an option that only our layers have would be lost.

Each tool runs on a small network of torch.nn's layers and on the same network of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
import torch.utils.mkldnn
from on_ranks import assert_equal_on_all_ranks, gather_all
from ranks import Ranks
from torch import Tensor, distributed, nn
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm

import normfused

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of observers and exporters
]
ENGINE = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, ENGINE
    yield
    torch.backends.quantized.engine = before


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5))
Norms = tuple[Callable[[int], nn.Module], Callable[[int], nn.Module], bool]
STOCK: Norms = (nn.BatchNorm2d, nn.BatchNorm1d, True)
OURS: Norms = (normfused.BatchNorm2d, normfused.BatchNorm1d, True)


class Network(nn.Module):
    """Convolution, batch norm and ReLU; convolution and batch norm; linear layer and batch norm."""

    def __init__(self, norm2d: Callable[[int], nn.Module], norm1d: Callable[[int], nn.Module], relu: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3), norm2d(4), nn.ReLU() if relu else nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), norm2d(5)
        self.linear, self.bn3 = nn.Linear(5, 6), norm1d(6)
        for layer in (self.bn1, self.bn2, self.bn3):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.bn2(self.conv2(x))
        return self.dequant(self.bn3(self.linear(x.mean((2, 3)))))

    def pairs(self) -> list[list[str]]:
        first = ["conv1", "bn1", *(["relu1"] if isinstance(self.relu1, nn.ReLU) else [])]
        return [first, ["conv2", "bn2"], ["linear", "bn3"]]


def remaining(model: nn.Module) -> int:
    """The number of batch norms in a model that was not scripted, quantized ones included."""
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def in_graph(module: Any) -> int:
    return sum(node.kind() == "aten::batch_norm" for node in module.inlined_graph.nodes())


def traced(model: Network) -> tuple[Tensor, int]:
    trace = torch.jit.trace(model.eval(), X)
    assert in_graph(trace) == 3
    assert "normfused::" not in str(trace.inlined_graph)
    frozen = torch.jit.freeze(trace)
    return frozen(X), in_graph(frozen)


def traced_and_optimized(model: Network) -> tuple[Tensor, int]:
    optimized = torch.jit.optimize_for_inference(torch.jit.trace(model.eval(), X))
    return optimized(X), in_graph(optimized)


def scripted(model: Network) -> tuple[Tensor, int]:
    frozen = torch.jit.freeze(torch.jit.script(model.eval()))
    return frozen(X), in_graph(frozen)


def scripted_in_training(model: Network) -> tuple[Tensor, int]:
    script = torch.jit.script(model.train())
    outputs = [script(X), script(X + 1)]
    buffers = [b.double().flatten() for b in script.buffers()]
    return torch.cat([*(y.flatten().double() for y in outputs), *buffers]), 3


def traced_in_training(model: Network) -> tuple[Tensor, int]:
    trace = torch.jit.trace(model.train(), X, check_trace=False)
    model.load_state_dict(Network(*STOCK).state_dict())
    y = trace(X)
    return torch.cat([y.flatten().double(), *(b.double().flatten() for b in trace.buffers())]), 3


def without_linear(model: Network) -> nn.Sequential:
    """The part of the model for which torch has quantized and MKL-DNN layers."""
    norms = (model.conv1, model.bn1, model.relu1, model.conv2, model.bn2)
    return nn.Sequential(model.quant, *norms, model.dequant).eval()


def mkldnn(model: Network) -> tuple[Tensor, int]:
    part = without_linear(model)[1:-1]
    converted = torch.utils.mkldnn.to_mkldnn(part)
    return converted(X.to_mkldnn()).to_dense(), remaining(converted)


def fuse_conv_bn_eval(model: Network) -> tuple[Tensor, int]:
    model.eval()
    model.conv1, model.bn1 = nn.utils.fusion.fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()
    model.linear, model.bn3 = nn.utils.fusion.fuse_linear_bn_eval(model.linear, model.bn3), nn.Identity()
    return model(X), remaining(model)


def fx_optimization_fuse(model: Network) -> tuple[Tensor, int]:
    fused = optimization.fuse(model.eval())
    return fused(X), remaining(fused)


def fuse_fx(model: Network) -> tuple[Tensor, int]:
    fused = quantize_fx.fuse_fx(model.eval())
    return fused(X), remaining(fused)


def fuse_modules(model: Network) -> tuple[Tensor, int]:
    fused = quantization.fuse_modules(model.eval(), model.pairs())
    return fused(X), remaining(fused)


def static_quantization(model: Network) -> tuple[Tensor, int]:
    fused = quantization.fuse_modules(model.eval(), model.pairs())
    fused.qconfig = quantization.get_default_qconfig(ENGINE)
    prepared = quantization.prepare(fused)
    prepared(X)
    converted = quantization.convert(prepared)
    return converted(X), remaining(converted)


def static_quantization_without_fusion(model: Network) -> tuple[Tensor, int]:
    part = without_linear(model)
    part.qconfig = quantization.get_default_qconfig(ENGINE)
    prepared = quantization.prepare(part)
    prepared(X)
    converted = quantization.convert(prepared)
    return converted(X), remaining(converted)


def quantization_aware_training(model: Network) -> tuple[Tensor, int]:
    fused = quantization.fuse_modules_qat(model.train(), model.pairs())
    fused.qconfig = quantization.get_default_qat_qconfig(ENGINE)
    prepared = quantization.prepare_qat(fused)
    prepared(X).square().sum().backward()
    converted = quantization.convert(prepared.eval())
    return converted(X), remaining(converted)


def dynamic_quantization(model: Network) -> tuple[Tensor, int]:
    converted = quantization.quantize_dynamic(model.eval(), {nn.Linear})
    return converted(X), remaining(converted)


def fx_quantization(model: Network) -> tuple[Tensor, int]:
    prepared = quantize_fx.prepare_fx(model.eval(), quantization.get_default_qconfig_mapping(ENGINE), (X,))
    prepared(X)
    converted = quantize_fx.convert_fx(prepared)
    return converted(X), remaining(converted)


def fx_quantization_aware_training(model: Network) -> tuple[Tensor, int]:
    mapping = quantization.get_default_qat_qconfig_mapping(ENGINE)
    prepared = quantize_fx.prepare_qat_fx(model.train(), mapping, (X,))
    prepared(X).square().sum().backward()
    converted = quantize_fx.convert_fx(prepared.eval())
    return converted(X), remaining(converted)


def average_and_update_bn(model: Network) -> tuple[Tensor, int]:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.optim.swa_utils.update_bn([X, X + 1], averaged)
    buffers = [b.double().flatten() for b in averaged.buffers()]
    return torch.cat([averaged.eval()(X).flatten().double(), *buffers]), remaining(averaged)


def replace_all_batch_norm_modules(model: Network) -> tuple[Tensor, int]:
    torch.func.replace_all_batch_norm_modules_(model)
    assert all(name.endswith("nonfinite_batches") for name, _ in model.named_buffers())
    return model.eval()(X), remaining(model)


# Name; function, remaining batch norms with torch.nn's layers and with ours, and why these differ.
TOOLS: dict[str, tuple[Callable[[Network], tuple[Tensor, int]], int, int, str]] = {
    "jit.trace, freeze": (traced, 0, 0, ""),
    "jit.trace, optimize_for_inference": (traced_and_optimized, 0, 0, ""),
    "jit.trace in training": (traced_in_training, 3, 3, ""),
    "jit.script, freeze": (scripted, 0, 0, ""),
    "jit.script in training": (scripted_in_training, 3, 3, ""),
    "utils.mkldnn.to_mkldnn": (mkldnn, 0, 0, ""),
    "fuse_conv_bn_eval, fuse_linear_bn_eval": (fuse_conv_bn_eval, 1, 1, ""),
    "fx.experimental.optimization.fuse": (fx_optimization_fuse, 0, 3, "looks for exact classes in its own list"),
    "quantize_fx.fuse_fx": (fuse_fx, 0, 3, "the same, in a graph of the general tracer"),
    "fuse_modules": (fuse_modules, 0, 0, ""),
    "fuse_modules, prepare, convert": (static_quantization, 0, 0, ""),
    "prepare, convert": (static_quantization_without_fusion, 2, 2, ""),
    "fuse_modules_qat, prepare_qat, convert": (quantization_aware_training, 0, 0, ""),
    "quantize_dynamic": (dynamic_quantization, 3, 3, ""),
    "prepare_fx, convert_fx": (fx_quantization, 0, 0, ""),
    "prepare_qat_fx, convert_fx": (fx_quantization_aware_training, 0, 0, ""),
    "AveragedModel, update_bn": (average_and_update_bn, 3, 3, ""),
    "replace_all_batch_norm_modules_": (replace_all_batch_norm_modules, 3, 3, ""),
}
rows: dict[str, str] = {}


@pytest.mark.parametrize("tool", list(TOOLS))
def test_tools_treat_plain_layers_like_torchs(tool: str) -> None:
    function, of_stock, of_ours, why = TOOLS[tool]
    (want, stock_left), (got, ours_left) = function(Network(*STOCK)), function(Network(*OURS))
    assert (stock_left, ours_left) == (of_stock, of_ours)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    difference = (got - want).abs().max().item()
    rows[tool] = f"{tool:40} {stock_left:8} {ours_left:8} {difference:10.1e}  {why}".rstrip()


def test_the_table(record_property: Callable[[str, object], None]) -> None:
    head = f"{'tool':40} {'torch.nn':>8} {'ours':>8} {'difference':>10}  batch norms remaining, and why they differ"
    record_property("table", "\n".join([head, *rows.values()]))
    if rows:  # complete if the whole file runs
        assert all(row.startswith(tool) for tool, row in rows.items())


def with_options(kind: str) -> Norms:
    def made(activation: Any, plain: Any) -> Callable[[int], nn.Module]:
        def make(channels: int) -> nn.Module:
            if kind == "activation":
                return activation(channels, "silu")
            if kind == "frozen":
                return plain(channels).freeze()
            return plain(
                channels, **{"nonfinite": {"nonfinite": "skip"}, "correction": {"running_var_correction": 0}}[kind]
            )

        return make

    return (
        made(normfused.BatchNormAct2d, normfused.BatchNorm2d),
        made(normfused.BatchNormAct1d, normfused.BatchNorm1d),
        kind != "activation",
    )


# Includes errors of torch, for classes that a tool does not know, and of float layers that get a quantized tensor.
REFUSALS = (
    r"would lose (activation='silu'|nonfinite='skip'|running_var_correction=0|frozen=True)"
    r"|did not find fuser method for: .*BatchNormAct"
    r"|batch_norm: input must be .* got torch.quint8"
    r"|the layer is frozen, but its running statistics are gone"
    r"|batch_norm: input must be a strided tensor, got layout torch\._mkldnn"
)


OPTIONS = ["activation", "frozen", "nonfinite", "correction"]
REFUSING = {
    **dict.fromkeys(("jit.script, freeze", "jit.script in training"), OPTIONS[1:]),
    **dict.fromkeys(("utils.mkldnn.to_mkldnn", "fuse_conv_bn_eval, fuse_linear_bn_eval", "prepare, convert"), OPTIONS),
    **dict.fromkeys(("fuse_modules", "fuse_modules, prepare, convert"), OPTIONS),
    "fuse_modules_qat, prepare_qat, convert": OPTIONS,
    "replace_all_batch_norm_modules_": ["frozen"],
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tool", list(TOOLS))
def test_an_option_is_preserved_or_refused(tool: str, option: str) -> None:
    """The result is that of the eager network, or an error names the option that would be lost."""
    norms = with_options(option)
    function = TOOLS[tool][0]
    if option in REFUSING.get(tool, []):
        with pytest.raises(Exception, match=REFUSALS):
            function(Network(*norms))
        return
    got, _ = function(Network(*norms))
    want = eagerly(function, Network(*norms))
    quantized = "convert" in tool or "dynamic" in tool
    tolerance = 0.1 * want.abs().max().item() if quantized else 1e-4
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=tolerance)


def eagerly(function: Any, model: Network) -> Tensor:
    """The result of the function if its tool did nothing."""
    if function in (scripted_in_training, traced_in_training):
        outputs = [model.train()(X + i).flatten().double() for i in range(2 if function is scripted_in_training else 1)]
        return torch.cat([*outputs, *(b.double().flatten() for b in model.buffers())])
    if function is average_and_update_bn:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.momentum = None
                if layer.training:
                    layer.reset_running_stats()
        model(X), model(X + 1)
        buffers = [torch.zeros(1, dtype=torch.float64), *(b.double().flatten() for b in model.buffers())]
        return torch.cat([model.eval()(X).flatten().double(), *buffers])
    if function is replace_all_batch_norm_modules:
        return model.train()(X)
    if "aware" in function.__name__:
        model.train()(X)
    if function in (mkldnn, static_quantization_without_fusion):
        return without_linear(model)(X)
    return model.eval()(X)


@pytest.mark.usefixtures("needs_extension")
def test_compilers_that_freeze_weights_give_correct_results() -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    act: Norms = (normfused.BatchNormAct2d, normfused.BatchNormAct1d, False)
    for norms in (OURS, act):
        model = Network(*norms).eval()
        with torch.no_grad(), config.patch(freezing=True):
            compiled = torch.compile(model, fullgraph=True)
            torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ci", ["", "1"])
@pytest.mark.usefixtures("needs_extension")
def test_inductor_calls_operators_that_have_decompositions(ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default Inductor raises if the environment variable CI is set."""
    from torch._inductor import lowering

    def every(x: Tensor) -> Tensor:
        x = normfused.functional.batch_norm(x, *torch.ones(4, 3))
        x = normfused.functional.local_response_norm(x, 3)
        return normfused.functional.normalize(x, [0.0] * 3, [2.0] * 3)

    monkeypatch.setenv("CI", ci)
    for name in ("batch_norm_inference", "local_response_norm", "standardize"):
        monkeypatch.delitem(lowering.lowerings, getattr(torch.ops.normfused, name).default, raising=False)
    torch._dynamo.reset()
    x = torch.randn(2, 3, 5, 5)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(every, fullgraph=True)
        assert torch.equal(compiled(x), every(x))


def test_ddp_broadcasts_buffers_of_layers_with_an_activation(ranks: Ranks) -> None:
    ranks.run(2, broadcast_buffers)


def broadcast_buffers() -> None:
    rank = distributed.get_rank()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), normfused.BatchNormAct2d(4), normfused.BatchNorm2d(4))
    parallel = nn.parallel.DistributedDataParallel(model)
    for step in range(2):
        parallel(X[rank : rank + 2] + step).sum().backward()
    assert not torch.equal(*gather_all(model[1].running_mean))  # the ranks have seen different data
    parallel(X)  # a forward pass first broadcasts the buffers of rank 0
    assert_equal_on_all_ranks(*(b.double() for b in model.buffers() if b.is_floating_point()))


@pytest.mark.parametrize("tool", list(TOOLS))
def test_tools_treat_converted_models_like_torchs(tool: str) -> None:
    function, *_ = TOOLS[tool]
    (want, _), (got, left_over) = function(Network(*STOCK)), function(normfused.convert(Network(*STOCK)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert left_over == TOOLS[tool][2]
