"""The operators of synchronized batch norm in one process, without collectives, on each device."""

from __future__ import annotations

import pytest
import torch
from common import DTYPES, dtype_id, lay_out
from torch import Tensor

from normfused import reference

pytestmark = pytest.mark.usefixtures("needs_extension")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", [(3, 5), (1, 0, 1), (40, 2, 0, 7)], ids=str)
def test_parts_of_a_batch_equal_the_whole(
    sizes: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], layout: str, device: torch.device
) -> None:
    ops = torch.ops.normfused
    dtype, parameter_dtype = dtypes
    x, r, grad = (torch.randn(sum(sizes), 6, 5, 5).mul(2).add(1).to(device, dtype) for _ in range(3))
    weight, bias = (torch.randn(6).to(device, parameter_dtype) for _ in range(2))
    running = [torch.zeros(6), torch.ones(6)]
    running = [buffer.to(device, parameter_dtype) for buffer in running]
    expected_running = [buffer.double().clone() for buffer in running]
    batches = torch.tensor(4, device=device)

    whole = [t.double().clone().requires_grad_() for t in (x, r, weight, bias)]
    after = {"activation": "relu", "residual": whole[1]}
    counter = batches.clone()
    expected_output = reference.batch_norm(
        whole[0], *expected_running, whole[2], whole[3], True, None, 1e-5, num_batches_tracked=counter, **after
    )
    expected_grads = torch.autograd.grad(expected_output, whole, grad.double())

    shares = [[lay_out(s, layout) if len(s) else s for s in t.split(list(sizes))] for t in (x, r, grad)]
    words = torch.stack([ops.pack_moments(share, 1e-5) for share in shares[0]])
    statistics, count = ops.merge_ranks(words, 6, 25 * sizes[0], *running, batches, None, 1e-5)
    outputs, sums, masks = [], [], []
    for own, residual, g in zip(*shares, strict=True):
        output, mask = ops.batch_norm_by_statistics(own, statistics, weight, bias, residual, "relu", 0.0, True)
        wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        given = (g, own, wide, statistics, True, [False, True, True, False])
        _, grad_weight, grad_bias, _ = ops.batch_norm_backward(*given, None, None, mask, "relu", 0.0)
        outputs.append(output)
        sums.append(torch.stack((grad_weight, grad_bias)))
        masks.append(mask)
    total = torch.stack(sums).sum(0)
    grads: list[tuple[Tensor, Tensor]] = []
    for own, g, mask in zip(shares[0], shares[2], masks, strict=True):
        given = (g, own, weight, statistics, True, [True, False, False, True], None, None, mask, "relu", 0.0, False)
        results = ops.batch_norm_backward(*given, total, count)
        grads.append((results[0], results[3]))

    assert count == 25 * sum(sizes)
    assert batches == counter == 5
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(parameter_dtype).eps)
    got = [torch.cat(outputs), *(torch.cat(part) for part in zip(*grads, strict=True)), *total, *running]
    expected = [expected_output, *expected_grads, *expected_running]
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= 60 * epsilon * max(1, b.abs().max())


def test_opcheck(device: torch.device) -> None:
    """The operators match their schemas and fake kernels, and refuse arguments that would crash them."""
    ops = torch.ops.normfused
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, grad = (torch.randn(4, 3, 5).to(device, dtype) for _ in range(2))
        parameter = torch.randn(3).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        words = ops.pack_moments(x, 1e-5)
        torch.library.opcheck(ops.pack_moments.default, (x, 1e-5))
        rows = torch.stack((words, words))
        buffers = [b.to(device) for b in (torch.zeros(3), torch.ones(3), torch.zeros((), dtype=torch.int64))]
        torch.library.opcheck(ops.merge_ranks.default, (rows, 3, 20, *buffers, None, 1e-5))
        statistics, count = ops.merge_ranks(rows, 3, 20, None, None, None, 0.1, 1e-5)
        assert count == 40
        arguments = (x, statistics, parameter, parameter, grad, "relu", 0.0, True)
        torch.library.opcheck(ops.batch_norm_by_statistics.default, arguments)
        sums = torch.randn(2, 3).to(parameter)
        output_mask = [True, False, False, False]
        arguments = (
            grad,
            x,
            parameter,
            statistics,
            True,
            output_mask,
            None,
            None,
            None,
            "identity",
            0.0,
            False,
            sums,
            count,
        )
        torch.library.opcheck(ops.batch_norm_backward.default, arguments)
        for gradient in ops.batch_norm_backward(grad, x, parameter, statistics, False, [False] * 4):
            assert gradient.numel() == 0
    with pytest.raises(ValueError, match="words must be int64, with the words of 4 channels in each row"):
        ops.merge_ranks(rows, 4, 20, None, None, None, 0.1, 1e-5)
    with pytest.raises(ValueError, match="sums and count must be given together"):
        ops.batch_norm_backward(*arguments[:-1])
    with pytest.raises(ValueError, match=r"statistics must be contiguous float64 of shape \(2, channels\)"):
        ops.batch_norm_by_statistics(x, statistics[0], None, None)
