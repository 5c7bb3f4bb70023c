"""Image normalization, data set statistics and local response normalization, compared with plain torch.

``python benchmarks/images.py`` writes images.json and images.md to results/<device>/. torchvision and OpenCV are
measured too if they are installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import command
import numpy as np
import tables
import torch
from cases import MEMORY_FORMATS
from timing import FULL, TINY, Budget, interleave, make_stopwatch, ratios, samplers
from torch import Tensor, nn

import normfused
from normfused.transforms import IMAGENET, ToNormalizedTensor

Calls = dict[str, Callable[[], Any]]

# Height and width of single images, and the target: time of the stock recipe / time of normfused.
IMAGES = {(224, 224): 4.0, (480, 640): 8.0, (1080, 1920): 10.0}
PIXELS = 100 * 480 * 640  # of all images of one call


@dataclass(frozen=True)
class Case:
    """Calls by name: ``normfused`` first, then its peers."""

    what: str
    shape: str
    calls: Calls
    targets: dict[str, float]  # by peer: minimum of the median ratio time of the peer / time of normfused
    tolerance: float  # relative to the largest value
    reference: str  # the peer that the results of the others are compared with
    different: tuple[str, ...] = ()  # peers that compute something else, and are not compared

    def check(self) -> None:
        """Asserts that the results of the peers agree with the reference."""
        expected = _tensors(self.calls[self.reference]())
        for name in self.calls.keys() - {self.reference, *self.different}:
            for a, b in zip(_tensors(self.calls[name]()), expected, strict=True):
                error = (a.double() - b.double()).abs().max() / b.double().abs().max()
                what = f"{self.what}, {self.shape}: relative error of {name} is {error:.1e}"
                assert error <= self.tolerance, what


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def cases(device: str) -> Iterator[Case]:
    for (height, width), minimum in IMAGES.items():
        yield one_image(height, width, minimum, device)
    yield batch(device)
    yield data_set("60,000×1×28×28", (60_000, 1, 28, 28), "NCHW", device)
    for layout in MEMORY_FORMATS:
        yield data_set("64×3×480×640", (64, 3, 480, 640), layout, device)
    yield quantiles("60,000×1×28×28", (60_000, 1, 28, 28), "NCHW", device)
    for layout in MEMORY_FORMATS:
        yield quantiles("64×3×480×640", (64, 3, 480, 640), layout, device)
    for shape in ((32, 96, 55, 55), (32, 256, 27, 27)):
        for layout in MEMORY_FORMATS:
            yield local_response(shape, layout, device)


def one_image(height: int, width: int, minimum: float, device: str) -> Case:
    """uint8 (H, W, C) to normalized float32 (C, H, W). The peers compute what torchvision's v1 and v2 transforms do.

    One call processes several images one after another, as the worker of a data loader does.
    """
    times = PIXELS // (height * width)
    hwc = _bytes((height, width, 3), device)
    image = hwc.permute(2, 0, 1)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET)
    ours = ToNormalizedTensor(*IMAGENET)

    def version_1() -> Tensor:
        tensor = image.contiguous().to(torch.float32).div(255)
        return tensor.clone().sub_(mean).div_(std)

    def version_2() -> Tensor:
        return (image.contiguous().to(torch.float32) / 255).sub(mean).div_(std)

    per_image: Calls = {"normfused": lambda: ours(image), "ToTensor + Normalize": version_1, "the same, v2": version_2}
    if importlib.util.find_spec("torchvision") and device == "cpu":
        from torchvision import transforms

        stock = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
        array = hwc.numpy()
        per_image["torchvision"] = lambda: stock(array)
    if importlib.util.find_spec("cv2") and device == "cpu":
        import cv2

        # albucore's method for uint8: a lookup table of 256 results per channel, then a transposition to CHW.
        values = torch.arange(256, device=device).view(256, 1) / 255
        results = (values - torch.tensor(IMAGENET[0])) / torch.tensor(IMAGENET[1])
        lookup, array = results[None].numpy(), hwc.numpy()
        per_image["cv2.LUT, transposed"] = lambda: (
            torch.from_numpy(cv2.LUT(array, lookup)).permute(2, 0, 1).contiguous()
        )
        per_image["cv2.LUT alone"] = lambda: cv2.LUT(array, lookup)
    calls = {name: _repeat(call, times) for name, call in per_image.items()}
    what, shape = f"{times} images, uint8 HWC to normalized float32 CHW", f"{height}×{width}×3"
    target = {"ToTensor + Normalize": minimum}
    return Case(what, shape, calls, target, 1e-6, "ToTensor + Normalize", ("cv2.LUT alone",))


def batch(device: str) -> Case:
    """The same for a batch, into an existing buffer. The peer copies as many bytes into another existing buffer."""
    images = _bytes((64, 480, 640, 3), device).permute(0, 3, 1, 2)
    out = torch.zeros(images.shape, device=device)
    values = torch.randn(images.numel() * 5 // 8, device=device)  # 1 byte read and 4 written per element; 8 in a copy
    buffer = values.clone()
    calls: Calls = {
        "normfused": lambda: normfused.normalize(images, *IMAGENET, out=out),
        "the same, a new output": lambda: normfused.normalize(images, *IMAGENET, memory_format=torch.contiguous_format),
        "copy of as many bytes": lambda: buffer.copy_(values),
    }
    what = "batch, uint8 HWC to normalized float32 CHW"
    target = {"copy of as many bytes": 0.6}
    return Case(what, "64×480×640×3", calls, target, 0, "the same, a new output", ("copy of as many bytes",))


def data_set(name: str, shape: tuple[int, ...], layout: str, device: str) -> Case:
    """Mean and standard deviation per channel of uint8 data. The peer converts all of it to float32."""
    x = _bytes(shape, device).contiguous(memory_format=MEMORY_FORMATS[layout])

    def recipe() -> tuple[Tensor, Tensor]:
        values = x.float() / 255
        return values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)

    def ours() -> tuple[Tensor, Tensor]:
        stats = normfused.ChannelStats().update(x)
        return stats.mean, stats.std

    calls: Calls = {"normfused": ours, "float().mean, std": recipe}
    return Case(
        "ChannelStats of uint8", f"{name} {layout}", calls, {"float().mean, std": 10.0}, 1e-4, "float().mean, std"
    )


def quantiles(name: str, shape: tuple[int, ...], layout: str, device: str) -> Case:
    """Two quantiles per channel of uint8 data, with all other statistics. The peers compute one of both."""
    x = _bytes(shape, device).contiguous(memory_format=MEMORY_FORMATS[layout])
    channels = [channel.cpu().numpy() for channel in x.unbind(1)]
    q = (0.01, 0.99)
    calls: Calls = {
        "normfused": lambda: normfused.ChannelStats(scale=1, quantiles=q).update(x).quantile(),
        "ChannelStats without quantiles": lambda: normfused.ChannelStats(scale=1).update(x).mean,
        "numpy.quantile": lambda: torch.from_numpy(np.stack([np.quantile(c, q) for c in channels], axis=1)),
    }
    what, target = "ChannelStats of uint8 with quantiles", {"ChannelStats without quantiles": 0.6}
    return Case(what, f"{name} {layout}", calls, target, 0, "numpy.quantile", ("ChannelStats without quantiles",))


def local_response(shape: tuple[int, ...], layout: str, device: str) -> Case:
    """Local response normalization, forward + backward."""
    x = torch.empty(shape, device=device).normal_().contiguous(memory_format=MEMORY_FORMATS[layout]).requires_grad_()
    grad = torch.randn_like(x)

    def step(layer: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        def forward_backward() -> tuple[Tensor, ...]:
            output = layer(x)
            return output.detach(), *torch.autograd.grad(output, x, grad)

        return forward_backward

    calls: Calls = {"normfused": step(normfused.LocalResponseNorm(5)), "torch.nn": step(nn.LocalResponseNorm(5))}
    name = "×".join(map(str, shape))
    return Case(
        "LocalResponseNorm(5), forward + backward", f"{name} {layout}", calls, {"torch.nn": 4.0}, 1e-5, "torch.nn"
    )


def _repeat(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    def repeated() -> Any:
        for _ in range(times):
            result = call()
        return result

    return repeated


def _bytes(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def rehearse(device: str) -> list[command.Row]:
    """Two small cases."""
    shape = (2, 3, 5, 7)
    few = [data_set("2×3×5×7", shape, "NCHW", device), quantiles("2×3×5×7", shape, "channels_last", device)]
    few += [local_response((2, 6, 3, 3), "channels_last", device)]
    return measure(device, few, TINY)


def measure(device: str, chosen: Iterable[Case] | None = None, budget: Budget = FULL) -> list[command.Row]:
    """One row per case and peer: medians over the rounds."""
    rows = []
    for case in cases(device) if chosen is None else chosen:
        stopwatch = make_stopwatch(device)
        case.check()
        for call in [*case.calls.values()] * 2:
            stopwatch(call)
        samples = interleave(samplers(case.calls, stopwatch), budget)
        for peer in list(case.calls)[1:]:
            row = {"what": case.what, "case": case.shape, "peer": peer, "target": case.targets.get(peer)}
            row |= {
                "ms": statistics.median(samples["normfused"]) * 1e3,
                "peer_ms": statistics.median(samples[peer]) * 1e3,
            }
            rows.append({**row, "ratio": statistics.median(ratios(samples, peer, "normfused"))})
        print(f"{case.what}, {case.shape}", flush=True)
    return rows


def render(description: dict[str, Any], rows: list[command.Row]) -> str:
    """One line per case and peer."""
    lines = []
    for row in rows:
        target, ratio = row["target"], row["ratio"]
        limit = "" if target is None else f"≥ {target:g}×"
        verdict = "" if target is None else "reached" if ratio >= target else "**not reached**"
        figures = f"{row['ms']:.3g}", f"{row['peer_ms']:.3g}", f"{ratio:.2f}×", limit, verdict
        lines.append((row["what"], row["case"], row["peer"], *figures))
    header = ("operation", "input", "peer", "normfused ms", "peer ms", "speedup over the peer", "target", "")
    parts = [
        f"# Images and statistics: {description.get('gpu', description['cpu'])}",
        command.versions(description),
        "Medians over rounds that run every call once. Each call allocates its output, unless noted.",
        tables.table(header, lines, text_columns=3),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "images", measure, render, rehearse))
