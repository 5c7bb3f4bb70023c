"""More values than 32 bits can count: ``pytest -m large`` (34 GB of memory on the device)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import normfused
from normfused import functional

NEEDED = 34 << 30


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        pytest.skip("this system does not tell its free memory")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in float64, 2^26 values at a time, as (values of a channel, channels)."""
    flat = [t.movedim(1, -1).reshape(-1, t.size(1)) if t.dim() == 2 else t[0].T for t in tensors]
    step = (1 << 26) // flat[0].size(1)
    for begin in range(0, flat[0].size(0), step):
        yield tuple(t[begin : begin + step].double() for t in flat)


@pytest.mark.large
@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("numel", [2**31 - 8, 2**31, 2**31 + 8])
def test_more_values_than_32_bits_count(device: torch.device, numel: int, channels_last: bool) -> None:
    if free_bytes(device) < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GB")
    channels = 8
    count = numel // channels
    shape = (count, channels) if channels_last else (1, channels, count)
    x = torch.randint(-64, 65, shape, dtype=torch.int8, device=device).to(torch.bfloat16) / 16
    grad_output = torch.randint(-64, 65, shape, dtype=torch.int8, device=device).to(torch.bfloat16) / 16

    mean = sum(p.sum(0) for (p,) in pieces(x)) / count
    m2 = sum(((p - mean) ** 2).sum(0) for (p,) in pieces(x))
    invstd = (m2 / count + 1e-5).rsqrt()
    moments = functional.channel_moments(x)
    assert moments.count == count
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.m2, m2, rtol=1e-6, atol=0)

    x.requires_grad_()
    layer = normfused.BatchNorm1d(channels, affine=False).to(device)
    y = layer(x)
    for values, output in pieces(x.detach(), y.detach()):
        torch.testing.assert_close(output, (values - mean) * invstd, rtol=4e-3, atol=1e-5)
    (grad_input,) = torch.autograd.grad(y, x, grad_output)
    g = sum(p.sum(0) for (p,) in pieces(grad_output)) / count
    gd = sum((p * (v - mean) * invstd).sum(0) for p, v in pieces(grad_output, x.detach())) / count
    for got, p, v in pieces(grad_input, grad_output, x.detach()):
        torch.testing.assert_close(got, invstd * (p - g - (v - mean) * invstd * gd), rtol=4e-3, atol=1e-4)
    y = layer.eval()(x.detach())
    scale = (layer.running_var.double() + 1e-5).rsqrt()
    for values, output in pieces(x.detach(), y):
        torch.testing.assert_close(output, (values - layer.running_mean.double()) * scale, rtol=4e-3, atol=1e-5)
