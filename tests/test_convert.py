"""Whole models are converted and reverted: families of networks, the report, copies, other tools."""

from __future__ import annotations

import copy
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from converted import OURS, images, resnet10, types
from models import BasicBlock, resnet18, resnet50
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import EXPECTED, ZOO, TimmNet

import normfused
from normfused.conversion import bytes_saved_for_backward

models = pytest.mark.parametrize("make", ZOO.values(), ids=ZOO.keys())
pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def three_steps(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of three steps of SGD, and the state after them."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    results = []
    for step in range(3):
        y = model(images(6 - step, dtype=dtype))
        results.append(y.detach())
        optimizer.zero_grad()
        y.square().mean().backward()
        results += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return results + [t.detach().clone() for t in model.state_dict().values()]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The maximum difference of all tensors, relative to the maximum of each tensor."""
    return max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(ours, theirs, strict=True))


# ---- families of networks --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_families_of_networks(record_property: Callable[[str, object], None]) -> None:
    """Outputs, three steps of SGD and evaluation are equal in float64. Each mode has one graph, without a break."""
    titles = f"{'norms':>5} {'replaced':>8} {'fused':>5} {'graphs':>6} {'training':>9} {'3 steps':>9} {'eval':>9}"
    lines = [f"{'model':22} {titles}"]
    for name, make in ZOO.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        stock = make().double()
        ours = normfused.convert(copy.deepcopy(stock))
        assert ours.training
        # Three steps of a deep network amplify rounding errors. A copy whose weights differ in the last bit shows the
        # order of magnitude.
        nudged = copy.deepcopy(stock)
        with torch.no_grad():
            for p in nudged.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps)
        runs = [three_steps(m, torch.float64) for m in (ours, stock, nudged)]
        report = normfused.conversion_report(ours)
        fused = len(report.fused)
        first, steps, limit = distance(runs[0][:1], runs[1][:1]), distance(*runs[:2]), distance(runs[2], runs[1])
        stock.load_state_dict(ours.state_dict())
        evaluated = distance([ours.eval()(images(2))], [stock.eval()(images(2))])
        lines.append(
            f"{name:22} {EXPECTED[name][0]:5} {len(report.replaced):8} {fused:5} {report.graphs:6} "
            f"{first:9.1e} {steps:9.1e} {evaluated:9.1e}"
        )
        assert first <= 1e-10, name
        assert evaluated <= 1e-10, name
        assert steps <= max(1e-10, 10 * limit), name
        assert (len(report.replaced), fused) == EXPECTED[name]
        assert (report.skipped, report.pending) == ([], []), name
        # Graphs for a batch of 6, for any batch, and for evaluation; a graph break would add more.
        assert report.graphs <= 4, name
    record_property("table", "\n".join(lines))


@pytest.mark.parametrize("name", ["resnet18", "unet", "timm silu, drop path"])
def test_in_float32_as_close_as_torch(name: str) -> None:
    torch.manual_seed(0)
    exact = ZOO[name]().double()
    stock = copy.deepcopy(exact).float()
    converted = normfused.convert(copy.deepcopy(stock))
    x = images(dtype=torch.float32)
    results = []
    for model, inputs in ((exact, x.double()), (stock, x), (converted, x)):
        torch.manual_seed(1)
        results.append(model(inputs).double())
    truth, theirs, ours = results
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6 * truth.abs().max()


# ---- what convert does immediately, and what it does not -------------------------------------------------------------


def test_conversion_runs_nothing_and_changes_only_classes() -> None:
    class Raises(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("convert must not run it")

    model = Raises(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4).eval(), nn.BatchNorm1d(2).bfloat16()
    )
    model.shared = model[1]
    model[1].weight.requires_grad_(False)
    before = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    state = torch.get_rng_state()
    attributes = {name: {k: v for k, v in vars(m).items()} for name, m in model.named_modules()}
    assert normfused.convert(model) is model
    assert type(model) is Raises
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == before
    for name, m in model.named_modules():
        now = {k: v for k, v in vars(m).items() if k != "_compiled_call_impl"}
        assert now == attributes[name]
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1] is model.shared
    assert [m.training for m in model][:5] == [True, True, True, False, True]
    assert model[4].weight.dtype == torch.bfloat16
    assert [path for path, _ in normfused.conversion_report(model).replaced] == ["1", "3", "4"]


def test_report_before_and_after_the_first_call() -> None:
    model = normfused.convert(resnet18())
    lines = str(normfused.conversion_report(model)).splitlines()
    assert lines[:2] == [
        "20 norms replaced, 0 fused",
        "fusions are known after the first call, or with example_inputs",
    ]
    model(images(dtype=torch.float32))
    report = normfused.conversion_report(model)
    lines = [re.sub(r" +", " ", line) for line in str(report).splitlines()]
    assert lines[0] == "20 norms replaced, 17 fused"
    assert " fused layer1.0.bn1 torch.nn.BatchNorm2d + relu" in lines
    assert " fused layer1.0.bn2 torch.nn.BatchNorm2d + add + relu" in lines
    assert " replaced layer2.0.downsample.1 torch.nn.BatchNorm2d: it is the residual of another norm" in lines


def test_report_with_example_inputs() -> None:
    torch.manual_seed(0)
    model = ZOO["timm silu, drop path"]()
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    normfused.convert(model, example_inputs=(images(dtype=torch.float32),))
    report = normfused.conversion_report(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert len(report.fused) == 5
    assert report.bytes_before is not None
    assert report.bytes_after is not None
    assert report.bytes_after < report.bytes_before
    assert str(report).splitlines()[-1].startswith("saved for backward: ")


@pytest.mark.parametrize("inputs", [torch.randn(1, 3, 8, 8), {"x": torch.randn(1, 3, 8, 8)}], ids=["tensor", "dict"])
def test_example_inputs_are_a_tuple(inputs: object) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    kind = type(inputs).__name__
    with pytest.raises(TypeError, match=rf"example_inputs must be a tuple of the model's arguments, got {kind}: write"):
        normfused.convert(model, example_inputs=inputs)
    assert type(model[0]) is nn.BatchNorm2d


def test_the_report_of_a_single_layer_names_it() -> None:
    layer = normfused.convert(nn.BatchNorm2d(3), fuse=False)
    assert str(normfused.conversion_report(layer)).splitlines() == [
        "1 norm replaced, 0 fused",
        "  replaced  (model)  torch.nn.BatchNorm2d",
    ]


def test_example_inputs_and_generators_are_unchanged() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, options: dict[str, Tensor]) -> Tensor:
            x.mul_(2)
            options["shift"].zero_()
            noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
            return F.relu(self.norm(x)) * noise

    x, options = images(dtype=torch.float32), {"shift": torch.ones(3)}
    expected = x.clone()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    normfused.convert(Changes(), example_inputs=(x, options))
    assert torch.equal(x, expected)
    assert options["shift"].all()
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_saved_bytes_are_counted() -> None:
    x = torch.randn(4, 8, 6, 6)
    size = x.numel() * 4
    layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Sigmoid())
    assert bytes_saved_for_backward(layers, x) == 3 * size  # the input, ReLU's output, Sigmoid's output


def test_a_block_with_a_silu_saves_less() -> None:
    x = torch.randn(4, 8, 6, 6)
    size = x.numel() * 4
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())
    small = 4 * 2 * 8 * 8
    assert abs(bytes_saved_for_backward(model, x) - 3 * size) < small  # the input, the norm's input, SiLU's input
    assert abs(bytes_saved_for_backward(normfused.convert(model), x) - 2 * size) < small


def test_bad_arguments_are_refused() -> None:
    for function in (normfused.convert, normfused.revert, normfused.convert_sync_batchnorm):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model must be a torch.nn.Module, got list"):
            function([])
    with pytest.raises(ValueError, match="inplace=True needs fuse=True"):
        normfused.convert(nn.BatchNorm2d(3), fuse=False, inplace=True)
    with pytest.raises(ValueError, match="conversion_report: this BatchNorm2d has not been converted"):
        normfused.conversion_report(nn.BatchNorm2d(3))


def test_a_single_layer_is_a_model_too() -> None:
    layer = normfused.convert(nn.BatchNorm2d(3))
    assert type(layer) is normfused.BatchNorm2d
    x = images(dtype=torch.float32)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))


def test_converting_twice_is_converting_once() -> None:
    model = normfused.convert(normfused.convert(resnet18()))
    model(images(dtype=torch.float32))
    report = normfused.conversion_report(model)
    assert (len(report.replaced), len(report.fused), report.graphs) == (20, 17, 1)


# ---- revert ----------------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("fuse", [True, False])
def test_revert_is_the_inverse(make: Callable[[], nn.Module], fuse: bool) -> None:
    torch.manual_seed(0)
    stock = make()
    model = copy.deepcopy(stock)
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    back = normfused.revert(normfused.convert(model, fuse=fuse))
    assert back is model
    assert types(back) == types(stock)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert {k: v.data_ptr() for k, v in back.state_dict().items()} == state
    x = images(3, dtype=torch.float32)
    torch.testing.assert_close(back.eval()(x), stock.eval()(x), rtol=0, atol=0)


def doubled(m: nn.Module) -> nn.Module:
    return m.double()


def assigned(m: nn.Module) -> nn.Module:
    m.load_state_dict(
        {k: v.double() * 2 if v.is_floating_point() else v for k, v in m.state_dict().items()}, assign=True
    )
    return m


def buffers_replaced(m: nn.Module) -> nn.Module:
    m.double()
    m.bn1.running_mean = torch.full_like(m.bn1.running_mean, 0.5)
    m.bn1.weight = nn.Parameter(torch.full_like(m.bn1.weight, 3))
    return m


def evaluated(m: nn.Module) -> nn.Module:
    m.double().eval()
    m.layer1.train()
    return m


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", [doubled, assigned, buffers_replaced, evaluated])
def test_revert_keeps_the_current_state(change: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    stock = resnet18()
    ours = normfused.convert(copy.deepcopy(stock))
    ours(images(dtype=torch.float32))
    stock(images(dtype=torch.float32))
    change(stock)
    change(ours)
    torch.testing.assert_close(ours(images()), stock(images()), rtol=1e-6, atol=1e-6)
    expected = {k: v.clone() for k, v in ours.state_dict().items()}
    back = normfused.revert(ours)
    torch.testing.assert_close(back.state_dict(), expected, rtol=0, atol=0)
    assert [m.training for m in back.modules()] == [m.training for m in stock.modules()]
    torch.testing.assert_close(back(images()), stock(images()), rtol=1e-6, atol=1e-6)


# ---- number of graphs per mode ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_modes_and_sizes_need_a_bounded_number_of_graphs() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), BasicBlock(4, 6, 2)).double()
    ours = normfused.convert(copy.deepcopy(stock))
    for _ in range(2):
        for n, size in ((4, 32), (6, 32), (5, 40), (7, 48), (3, 64)):
            x = images(n, size)
            for training in (True, False):
                for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                    with context():
                        got, expected = ours.train(training)(x), stock.train(training)(x)
                    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    # Six modes, each with up to three graphs: for the first size, for any batch, and for any size.
    assert normfused.conversion_report(ours).graphs <= 6 * 3


@pytest.mark.exhaustive
def test_blocks_of_many_widths_are_all_fused() -> None:
    """More blocks than Dynamo's limit of eight, in a plain container, and called one by one."""

    def block(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 1))

    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(map(block, range(1, 21)))

        @torch._dynamo.disable(recursive=False)
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.blocks:
                x = layer(x)
            return x

    for model in (nn.Sequential(*map(block, range(1, 21))), OneByOne()):
        normfused.convert(model)
        model(images(dtype=torch.float32))
        report = normfused.conversion_report(model)
        assert len(report.fused) == 20
        assert report.pending == []


def test_the_limit_of_graphs_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfused.conversion.capture.RECOMPILE_LIMIT", 2)
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.0), nn.ReLU()).double()
    ours = normfused.convert(copy.deepcopy(stock))
    x, warned = images(), []
    for p in (0.0, 0.1, 0.2, 0.3, 0.4):
        for m in (ours, stock):
            m[2].p = p
        results = []
        for m in (ours, stock):
            torch.manual_seed(1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results.append(m(x))
            warned += [str(w.message) for w in caught if "normfused.convert" in str(w.message)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert len(warned) == 1
    assert "has 2 captured graphs" in warned[0]
    assert "a module has reached the limit of 2 graphs" in str(normfused.conversion_report(ours))


def test_without_dynamo_only_classes_change() -> None:
    with torch._dynamo.config.patch(disable=True):
        model = normfused.convert(resnet10())
        assert all(isinstance(m, OURS) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        model(images(dtype=torch.float32))
    assert "nothing is fused: Dynamo is disabled" in str(normfused.conversion_report(model))


def test_timm_models_with_checkpointing_and_methods() -> None:
    torch.manual_seed(0)
    stock = TimmNet(nn.SiLU).double()
    ours = normfused.convert(copy.deepcopy(stock))
    x = images()
    torch.testing.assert_close(ours.forward_features(x), stock.forward_features(x), rtol=1e-10, atol=1e-10)
    report = normfused.conversion_report(ours)
    assert len(report.fused) == EXPECTED["timm relu"][1]
    assert ours.pretrained_cfg == stock.pretrained_cfg
    ours.stages[0].zero_init_last()
    assert not ours.stages[0].bn3.weight.any()


@pytest.mark.exhaustive
def test_readme_snippet_with_a_frozen_stem(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "conversion_report" in block)
    program = f"""
import copy, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import normfused
from models import resnet18
class Frozen(type(resnet18())):
    def forward(self, x):
        with torch.no_grad():
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
for frozen in (False, True):
    model, images = resnet18(), torch.randn(4, 3, 32, 32)
    if frozen:
        model.__class__ = Frozen
    before = copy.deepcopy(model)
{chr(10).join("    " + line for line in snippet.splitlines())}
    print(model)
    y = model(images)
    torch.testing.assert_close(y, before(images), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert (model.conv1.weight.grad is None) == frozen
    assert model.layer1[0].conv1.weight.grad is not None
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "20 norms replaced, 17 fused" in result.stdout
    assert "BatchNorm2d(4, eps=1e-05" in result.stdout


# ---- in place --------------------------------------------------------------------------------------------------------


def test_a_network_of_leaky_relus_in_place() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
            self.act = nn.LeakyReLU(0.1, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = self.act(norm(conv(x)))
            return F.avg_pool2d(x, 2)

    torch.manual_seed(0)
    stock = Leaky().double()
    ours = normfused.convert(copy.deepcopy(stock), inplace=True)
    results = []
    for model in (ours, stock):
        y = model(images())
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert set(normfused.conversion_report(ours).fused.values()) == {"leaky_relu, in place"}
    assert bytes_saved_for_backward(ours, images()) < 0.7 * bytes_saved_for_backward(stock, images())


@pytest.mark.exhaustive
def test_resnet50_is_reported_as_a_table() -> None:
    model = normfused.convert(resnet50(), example_inputs=(images(2, 64, torch.float32),))
    lines = str(normfused.conversion_report(model)).splitlines()
    assert lines[0] == "53 norms replaced, 49 fused"
    expected = ["fused", "layer2.1.bn3", "torch.nn.BatchNorm2d", "+", "add", "+", "relu"]
    assert any(line.split() == expected for line in lines)
