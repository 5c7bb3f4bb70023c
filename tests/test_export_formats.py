"""Evaluation in formats that know only torch's operators: ONNX, TorchScript, decomposed exported programs."""

from __future__ import annotations

import collections
import copy
import io
import warnings
from collections.abc import Callable

import onnx
import onnxruntime
import pytest
import torch
from common import assert_same_bits, lay_out
from models import resnet18
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import normfused
from normfused import decompositions
from normfused.activations import ACTIVATIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of exporters
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "jit"])
KINDS = list(ACTIVATIONS)


def trained(model: nn.Module, *shape: int) -> nn.Module:
    for _ in range(2):
        model(torch.randn(shape) * 2 + 1)
    return model.eval()


def to_onnx(model: nn.Module, x: Tensor, dynamo: bool) -> tuple[Tensor, collections.Counter[str]]:
    """The output of onnxruntime, and the number of each of its operators."""
    file = io.BytesIO()
    if dynamo:
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        assert program is not None
        program.save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    graph = onnx.load_from_string(file.getvalue()).graph
    assert all(node.domain == "" for node in graph.node)
    return torch.from_numpy(output), collections.Counter(node.op_type for node in graph.node)


class Blocks(nn.Module):
    """Layers with activations and residuals, layers in place, and local response norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(normfused.BatchNormAct2d(3, kind) for kind in KINDS)
        self.inplace, self.local = normfused.BatchNorm2d(3, inplace=True), normfused.LocalResponseNorm(2)
        self.leaky = normfused.BatchNormAct2d(3, "leaky_relu", 0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for i, norm in enumerate(self.norms):
            x = norm(x, x * 0.5) if i % 2 else norm(x)
        x = self.local(self.inplace(x * 2))
        return self.leaky(x * 3)


@pytest.mark.exhaustive
@exporters
def test_onnx_of_a_residual_network(dynamo: bool) -> None:
    model = trained(normfused.convert(resnet18(), fuse=False), 4, 3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    got, operators = to_onnx(model, x, dynamo)
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-5, atol=1e-5)
    stock, of_stock = to_onnx(normfused.revert(copy.deepcopy(model)), x, dynamo)
    torch.testing.assert_close(got, stock, rtol=1e-5, atol=1e-5)
    assert operators == of_stock  # the same graph, with the batch norms folded into convolutions


@pytest.mark.exhaustive
@exporters
def test_onnx_of_a_fused_network(dynamo: bool) -> None:
    model = trained(normfused.convert(resnet18()), 4, 3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    got, operators = to_onnx(model, x, dynamo)
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-5, atol=1e-5)
    assert operators["Relu"] == 17
    assert operators["Add"] == 8


@exporters
def test_onnx_of_activations_and_residuals(dynamo: bool) -> None:
    model = trained(Blocks(), 4, 3, 6, 6)
    x = torch.randn(2, 3, 6, 6)
    got, operators = to_onnx(model, x, dynamo)
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-5, atol=1e-5)
    assert operators["BatchNormalization"] == len(KINDS) + 2


@exporters
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_onnx_of_standardized_images(dtype: torch.dtype, dynamo: bool) -> None:
    class Images(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return normfused.normalize(x, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])

    x = torch.randint(0, 255, (2, 3, 5, 4)).to(dtype)
    got, _ = to_onnx(Images(), x, dynamo)
    torch.testing.assert_close(got, Images()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("needs_extension")
def test_onnx_export_in_training_fails_with_the_operators_name() -> None:
    with pytest.raises(Exception, match="normfused::batch_norm_training"):
        torch.onnx.export(
            normfused.BatchNorm2d(3),
            (torch.randn(2, 3, 4, 4),),
            io.BytesIO(),
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
        )


@pytest.mark.usefixtures("needs_extension")
def test_exported_programs_are_decomposed_only_on_request() -> None:
    model = trained(Blocks(), 4, 3, 6, 6)
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=9)},))

    def ours(program: torch.export.ExportedProgram) -> int:
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        return sum(target.startswith("normfused.") for target in targets)

    count = len(KINDS) + 3
    assert ours(program) == ours(program.run_decompositions()) == count
    decomposed = program.run_decompositions(torch._decomp.decomposition_table)
    assert ours(decomposed) == 0
    for n in (2, 5):
        x = torch.randn(n, 3, 6, 6)
        assert_same_bits(program.module()(x.clone()), model(x.clone()))
        torch.testing.assert_close(decomposed.module()(x.clone()), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("needs_extension")
def test_compilers_keep_the_operators() -> None:
    from torch._inductor.decomposition import select_decomp_table

    for name in ("batch_norm_inference", "local_response_norm", "standardize"):
        operator = getattr(torch.ops.normfused, name).default
        assert operator in torch._decomp.decomposition_table
        for table in (select_decomp_table(), torch._decomp.core_aten_decompositions()):
            assert operator not in table


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_compilers_keep_the_layout_if_sizes_are_symbolic(layout: str) -> None:
    """torch derives shapes from an operator's decomposition, unless a meta kernel is registered too."""
    ops = torch.ops.normfused
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.batch_norm_inference(x, None, None, x.new_zeros(3), x.new_ones(3), 1e-5, x, "relu")[0],
        lambda x: ops.local_response_norm(x, 3, 0.1, 0.75, 1.0),
        lambda x: ops.standardize(x, [0.0] * 3, [1.0] * 3),
    ]
    x = lay_out(torch.randn(4, 3, 5, 6), layout)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = mode.from_tensor(
            x, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC] * 2)
        )
        assert isinstance(fake.shape[0], torch.SymInt)
        strides = [[int(s) for s in call(fake).stride()] for call in calls]
    assert strides == [list(call(x).stride()) for call in calls]


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_decompositions_equal_the_operators(dtype: torch.dtype, kind: str) -> None:
    x, r = (torch.randn(4, 3, 5, 6).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    parameters = [torch.rand(3, dtype=wide) + 0.5 for _ in range(4)]
    got = decompositions.batch_norm_inference(x, *parameters, 1e-3, r, kind, 0.3)
    want = torch.ops.normfused.batch_norm_inference(x, *parameters, 1e-3, r, kind, 0.3)[0]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=8 * tolerance)
    for size in (1, 4, 9):
        got = decompositions.local_response_norm(x, size, 0.1, 0.75, 2.0)
        want = torch.ops.normfused.local_response_norm(x, size, 0.1, 0.75, 2.0)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for memory_format in (torch.preserve_format, torch.channels_last):
        constants = ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 0.5, dtype, memory_format)
        got, want = (f(x, *constants) for f in (decompositions.standardize, torch.ops.normfused.standardize))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_traces_of_every_dimension_and_dtype(dtype: torch.dtype) -> None:
    layers = [
        (normfused.BatchNorm1d(3, affine=False), (4, 3)),
        (normfused.BatchNormAct1d(3, "tanh"), (4, 3, 5)),
        (normfused.BatchNorm3d(3), (4, 3, 2, 3, 5)),
        (normfused.SyncBatchNorm(3), (4, 3, 5)),
        (normfused.LocalResponseNorm(3), (4, 3, 5)),
        (normfused.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    ]
    for layer, shape in layers:
        layer = layer.to(dtype).eval()
        x = torch.randn(shape).to(dtype)
        tracked = getattr(layer, "running_mean", None) is not None
        with warnings.catch_warnings():
            warnings.simplefilter("error" if tracked else "ignore", torch.jit.TracerWarning)
            trace = torch.jit.trace(layer, x)
        if tracked:
            assert "aten::batch_norm" in str(trace.inlined_graph)
            assert "normfused::" not in str(trace.inlined_graph)
        other = torch.randn(shape[0] + 3, *shape[1:]).to(dtype)
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(trace(other), layer(other), rtol=tolerance, atol=tolerance)


def test_a_trace_refuses_inputs_that_the_layer_refuses() -> None:
    layer = normfused.BatchNorm2d(3).eval()
    with pytest.raises(ValueError, match="weight has 3 elements, but input"):
        torch.jit.trace(layer, torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match="residual must have input's shape"):
        torch.jit.trace(layer, (torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 4)))


class Scripted(nn.Module):
    """Many layers, so that one gets the address of another that was deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = normfused.BatchNorm2d(4), normfused.BatchNormAct1d(4, "gelu_tanh")
        self.acts = nn.ModuleList(normfused.BatchNormAct2d(4, kind) for kind in KINDS)
        self.leaky, self.local = normfused.BatchNormAct2d(4, "elu", 0.3), normfused.LocalResponseNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaky(self.first(x), x)
        for act in self.acts:
            x = act(x)
        return self.last(self.local(x).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_scripts_equal_the_layers(training: bool) -> None:
    eager = Scripted()
    trained(eager, 5, 4, 6, 6).train(training)
    model = copy.deepcopy(eager)
    parameters = list(map(id, model.parameters()))
    script = torch.jit.script(model)
    assert list(script.state_dict()) == list(eager.state_dict()) == list(model.state_dict())
    assert list(map(id, model.parameters())) == parameters
    for _ in range(2):
        x = torch.randn(5, 4, 6, 6)
        torch.testing.assert_close(script(x), eager(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x + 1), eager(x + 1), rtol=1e-4, atol=1e-5)  # the original still runs
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(script.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.jit.save(script.eval(), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), eager.eval()(x), rtol=1e-4, atol=1e-5)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: normfused.BatchNorm2d(3).freeze(), "torch.jit.script would lose frozen=True of BatchNorm2d"),
    (lambda: normfused.BatchNormAct1d(3, nonfinite="skip"), "would lose nonfinite='skip' of BatchNormAct1d"),
    (lambda: normfused.BatchNorm3d(3, running_var_correction=0), "would lose running_var_correction=0 of BatchNorm3d"),
    (lambda: normfused.SyncBatchNorm(3), "torch.jit.script cannot compile SyncBatchNorm; call normfused.revert first"),
    (lambda: normfused.SyncBatchNormAct(3), "cannot compile SyncBatchNormAct; call normfused.revert first"),
]


@pytest.mark.parametrize(("layer", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_scripts_refuse_options_that_they_would_lose(layer: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer())
    with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
        torch.jit.script(model)


def test_a_subclass_with_its_own_forward_is_not_replaced() -> None:
    class Doubled(normfused.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input) * 2

    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile Doubled"):
        torch.jit.script(nn.Sequential(Doubled(3)))


@pytest.mark.usefixtures("needs_extension")
def test_profilers_and_flop_counters() -> None:
    x = torch.randn(2, 3, 6, 6)
    counts = []
    for norm in (nn.BatchNorm2d(4), normfused.BatchNorm2d(4), normfused.BatchNormAct2d(4)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
        with profile() as seen:
            model(x)
            model.eval()(x)
        names = {event.key for event in seen.key_averages()}
        if not type(norm).__module__.startswith("torch."):
            assert {"normfused::batch_norm_training", "normfused::batch_norm_inference"} <= names
    assert counts[0] > 0
    assert counts == [counts[0]] * 3
