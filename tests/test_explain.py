"""``explain``: the plans of the CUDA kernels for a layer and a tensor, on any machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfused
from normfused import cuda_plans, explain

pytestmark = pytest.mark.usefixtures("needs_extension")


def empty(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.empty(*shape, device="meta", dtype=dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def described(layer: nn.Module, x: Tensor, device: str = "h100") -> list[tuple[str, int, float]]:
    """Path, launches and bytes relative to the size of the tensor of each pass."""
    size = x.numel() * x.element_size()
    passes = explain(layer, x, device=device).passes
    assert [p.name for p in passes] == ["forward", "backward"]
    return [(p.path, p.launches, round((p.read_bytes + p.written_bytes) / size, 2)) for p in passes]


TWO = "reduction, then application"
HELD = "held in shared memory"
AGAIN = "read again from the L2 cache"


@pytest.mark.parametrize(
    ("layer", "x", "expected"),
    [
        (normfused.BatchNorm2d(64), empty(32, 64, 112, 112), [(HELD, 1, 2.0), (AGAIN, 1, 3.0)]),
        (normfused.BatchNorm2d(64), empty(32, 64, 112, 112, channels_last=True), [(TWO, 2, 3.0), (TWO, 2, 5.0)]),
        (normfused.BatchNormAct2d(64), empty(8, 64, 8, 8), [(HELD, 1, 2.02), (HELD, 1, 3.02)]),
        (normfused.BatchNorm2d(64).eval(), empty(32, 64, 112, 112), [("application", 1, 2.0), (TWO, 2, 4.0)]),
        (
            normfused.BatchNorm2d(64, affine=False).eval(),
            empty(32, 64, 112, 112),
            [("application", 1, 2.0), ("application", 1, 2.0)],
        ),
        (
            normfused.BatchNormAct2d(64, "silu", affine=False).eval(),
            empty(32, 64, 112, 112),
            [("application", 1, 2.0), ("application", 1, 3.0)],
        ),
        (
            normfused.BatchNorm2d(64, track_running_stats=False).eval(),
            empty(32, 64, 112, 112),
            [(HELD, 1, 2.0), (AGAIN, 1, 3.0)],
        ),
        (normfused.BatchNorm1d(512), empty(512, 512), [(HELD, 1, 2.02), (HELD, 1, 3.02)]),
        (normfused.GroupNorm(32, 1280), empty(2, 1280, 16, 16), [("held in registers", 1, 2.0), (HELD, 3, 3.03)]),
        (normfused.GroupNormAct(32, 320), empty(2, 320, 64, 64), [(HELD, 1, 2.0), (HELD, 3, 3.0)]),
        (normfused.GroupNormAct(32, 320), empty(2, 320, 80, 80), [(HELD, 1, 2.0), (HELD, 3, 3.0)]),
        (normfused.GroupNormAct(32, 320), empty(2, 320, 256, 256), [(TWO, 3, 3.0), (TWO, 6, 5.0)]),
        (nn.LayerNorm(50_000), empty(16, 50_000), [(HELD, 1, 2.0), (TWO, 5, 9.0)]),
        (
            normfused.GroupNorm(32, 1280),
            empty(2, 1280, 16, 16, channels_last=True, dtype=torch.bfloat16),
            [(HELD, 1, 2.06), (HELD, 3, 3.06)],
        ),
        (
            normfused.GroupNorm(32, 320),
            empty(2, 320, 256, 256, channels_last=True, dtype=torch.bfloat16),
            [(TWO, 3, 3.03), (TWO, 6, 5.01)],
        ),
        (
            normfused.BatchNorm2d(64),
            empty(32, 64, 112, 112, channels_last=True, dtype=torch.bfloat16),
            [("held in shared memory in part", 1, 2.69), (TWO, 2, 5.01)],
        ),
        (normfused.InstanceNorm3d(32), empty(2, 32, 20, 20, 20), [("held in registers", 1, 2.0), (HELD, 3, 3.0)]),
        (normfused.InstanceNorm2d(32), empty(32, 128, 128), [("held in registers", 1, 2.0), (HELD, 3, 3.0)]),
        (
            normfused.InstanceNorm2d(32, track_running_stats=True).eval(),
            empty(4, 32, 128, 128),
            [("application", 1, 2.0), ("application", 1, 2.0)],
        ),
        (
            normfused.LayerNorm(768),
            empty(4096, 768),
            [("held in registers", 1, 2.0), ("held in registers", 4, 3.26)],
        ),
        (nn.RMSNorm(100_000), empty(16, 100_000), [(HELD, 1, 2.0), (TWO, 5, 7.5)]),
        (nn.RMSNorm(500_000), empty(16, 500_000), [(TWO, 2, 3.0), (TWO, 5, 5.5)]),
        (
            normfused.LayerNorm2d(96),
            empty(32, 96, 56, 56),
            [("read again from the caches", 1, 2.0), ("read again from the caches", 4, 3.01)],
        ),
        (
            normfused.RMSNorm2d(96),
            empty(32, 96, 56, 56, channels_last=True),
            [("held in registers", 1, 2.0), ("held in registers", 4, 3.01)],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_paths_launches_and_bytes(layer: nn.Module, x: Tensor, expected: list[tuple[str, int, float]]) -> None:
    assert described(layer, x) == expected


def test_a_device_whose_shared_memory_holds_more_than_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda_plans.CudaDevice("large", 132, 8 << 20, 227 << 10, 8)
    monkeypatch.setitem(cuda_plans._DEVICES, device.name, device)
    x = empty(64, 64, 32, 32, channels_last=True)
    forward, backward = explain(normfused.BatchNorm2d(64), x, device=device.name).passes
    assert (forward.path, forward.reason) == (HELD, "256 blocks keep the whole tensor")
    assert forward.read_bytes - x.numel() * 4 < 0.02 * x.numel() * 4  # besides the partial sums
    assert (backward.path, "read the other" in backward.reason) == (HELD + " in part", True)


def test_the_floor_moves_each_tensor_once() -> None:
    x = empty(4, 8, 5, 5)
    size = x.numel() * 4
    frozen = normfused.BatchNorm2d(8, affine=False).eval()
    activated = normfused.BatchNormAct2d(8, affine=False).eval()
    for layer, floors in ((normfused.BatchNorm2d(8), (2, 3)), (frozen, (2, 2)), (activated, (2, 3))):
        assert [p.floor_bytes for p in explain(layer, x, device="t4").passes] == [n * size for n in floors]


def test_bytes_of_resnet50() -> None:
    """All 53 batch norms of a step in bfloat16, relative to the floor: each tensor is moved once."""
    counts = {(64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5, (256, 28): 1,
              (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4}  # fmt: skip
    assert sum(counts.values()) == 53
    moved = floor = 0
    for (channels, side), count in counts.items():
        x = empty(256, channels, side, side, dtype=torch.bfloat16)
        for step in explain(nn.BatchNorm2d(channels), x, device="h100").passes:
            moved += count * (step.read_bytes + step.written_bytes)
            floor += count * step.floor_bytes
    assert moved / floor == pytest.approx(1, abs=0.001)


def test_the_plan_depends_on_the_device() -> None:
    layer, x = normfused.BatchNorm2d(64), empty(32, 64, 112, 112)
    reasons = [explain(layer, x, device=device).passes[1].reason for device in ("t4", "h100")]
    assert reasons == [
        "5 blocks for each of 64 ranges of channels",
        "a range of channels is applied when the next 4 ranges of 64 are reduced",
    ]


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        (normfused.GroupNorm(32, 320), empty(2, 320, 80, 80), "2 blocks of a cluster hold the 64000 values of a stat"),
        (normfused.GroupNorm(32, 320), empty(2, 320, 256, 256), "the 655360 values of a statistic do not fit shared"),
        (normfused.GroupNorm(4, 64), empty(2, 64, 3), "a vector has values of several channels"),
        (
            normfused.GroupNorm(4, 64),
            empty(2, 64, 5, 5, channels_last=True),
            "a block holds the 400 values of a statistic",
        ),
        (
            normfused.GroupNorm(3, 6),
            empty(2, 6, 5, 5, channels_last=True),
            "the 50 values of a statistic do not fit sha",
        ),
        (normfused.RMSNorm(100_000), empty(16, 100_000), "2 blocks of a cluster hold the 100000 values of a row"),
        (normfused.RMSNorm(500_000), empty(16, 500_000), "the 500000 values of a row are divided among 31 blocks"),
    ],
    ids=[
        "cluster",
        "large",
        "short rows",
        "channels last",
        "vectors of several positions",
        "row of a cluster",
        "long rows",
    ],
)
def test_reasons(layer: nn.Module, x: Tensor, reason: str) -> None:
    assert explain(layer, x, device="h100").passes[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("ours", "torchs", "shape"),
    [
        (normfused.BatchNorm2d(8), nn.BatchNorm2d(8), (4, 8, 5, 5)),
        (normfused.GroupNorm(2, 8), nn.GroupNorm(2, 8), (4, 8, 5, 5)),
        (normfused.InstanceNorm1d(8), nn.InstanceNorm1d(8), (4, 8, 5)),
        (normfused.LayerNorm(5), nn.LayerNorm(5), (4, 8, 5)),
        (normfused.RMSNorm((8, 5)), nn.RMSNorm((8, 5)), (4, 8, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_of_torch_has_the_plan_of_ours(ours: nn.Module, torchs: nn.Module, shape: tuple[int, ...]) -> None:
    assert explain(ours, empty(*shape), device="l4").passes == explain(torchs, empty(*shape), device="l4").passes


def test_nothing_is_computed_or_changed() -> None:
    layer = normfused.BatchNorm2d(3)
    explain(layer, torch.full((2, 3, 4, 4), 7.0), device="a100")
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.weight.device.type == "cpu"


def test_text() -> None:
    plan = explain(normfused.BatchNorm2d(3), torch.empty(2, 3, 4, 4), device="A100")
    assert str(plan).splitlines()[1:] == [
        "(2, 3, 4, 4), torch.float32, contiguous",
        "a100: 108 multiprocessors, 40 MiB of L2",
        "forward: held in shared memory (a block copies its channels once, 4.1 kB)",
        "    1 launch, 0.9 kB moved, 1.12 times the 0.8 kB of the tensors",
        "backward: held in shared memory (a block copies its channels once, 8.2 kB)",
        "    1 launch, 1.2 kB moved, 1.08 times the 1.2 kB of the tensors",
    ]


class Unsupported(nn.Module):
    pass


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: explain(Unsupported(), empty(2, 3), device="h100"), TypeError, "layer Unsupported has no plan; batch"),
        (
            lambda: explain(normfused.SyncBatchNorm(3), empty(2, 3, 4, 4), device="h100"),
            TypeError,
            "layer SyncBatchNorm has no plan: its launches depend on the other processes",
        ),
        (
            lambda: explain(normfused.LocalResponseNorm(3), empty(2, 3, 4, 4), device="h100"),
            TypeError,
            "layer LocalResponseNorm has no plan",
        ),
        (
            lambda: explain(normfused.BatchNorm2d(3), empty(2, 3, 4, 4, dtype=torch.int32), device="h100"),
            TypeError,
            "x must be a floating tensor, got torch.int32",
        ),
        (
            lambda: explain(normfused.BatchNorm2d(3), [1.0], device="h100"),  # type: ignore[arg-type]
            TypeError,
            "x must be a floating tensor, got list",
        ),
        (lambda: explain(nn.LayerNorm(3), empty(0, 3), device="h100"), ValueError, r"x has no values: shape \(0, 3\)"),
        (
            lambda: explain(normfused.BatchNorm2d(3), empty(2, 4, 4, 4), device="h100"),
            ValueError,
            r"weight has 3 elements, but input of shape \(2, 4, 4, 4\) has 4 channels",
        ),
        (
            lambda: explain(nn.InstanceNorm2d(3), empty(4, 4, 4), device="h100"),
            ValueError,
            r"x must have 3 channels, got shape \(4, 4, 4\)",
        ),
        (lambda: explain(normfused.BatchNorm2d(3), empty(2, 3), device="h100"), ValueError, "4D"),
        (
            lambda: explain(normfused.BatchNorm2d(3), empty(2, 3, 4, 8)[..., ::2], device="h100"),
            ValueError,
            r"x must be dense in memory, in an order that the layer reads, got strides \(96, 32, 8, 2\)",
        ),
        (
            lambda: explain(normfused.LayerNorm(3), empty(2, 3, 4).mT, device="h100"),
            ValueError,
            r"x must be dense in memory, in an order that the layer reads, got strides \(12, 1, 4\)",
        ),
        (
            lambda: explain(normfused.BatchNorm2d(3), empty(2, 3, 4, 4), device="k80"),
            ValueError,
            'device must be one of "a100", "h100", "h200", "l4", "t4" or a CUDA device, got \'k80\'',
        ),
        (
            lambda: explain(normfused.BatchNorm2d(3), torch.empty(2, 3, 4, 4)),
            ValueError,
            "device must be one of .*, got 'cpu'",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_a_cuda_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device 'cuda:0' is not available; without it, pass one of"):
        explain(normfused.BatchNorm2d(3), torch.empty(2, 3, 4, 4), device="cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_of_the_tensor() -> None:
    plan = explain(normfused.BatchNorm2d(3).cuda(), torch.empty(2, 3, 4, 4, device="cuda"))
    assert plan.device.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
