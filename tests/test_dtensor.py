"""DTensors on two ranks: the results of one process, or an error that names the argument."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_ranks import error_of
from ranks import Ranks
from torch import Tensor, nn

import normfused
from normfused import functional

MESHES = [(2,), (1, 2), (2, 1)]
CASES = [
    (functools.partial(normfused.BatchNorm1d, 6), (4, 6, 5)),
    (functools.partial(normfused.BatchNorm2d, 6, affine=False), (4, 6, 3, 2)),
    (functools.partial(normfused.BatchNormAct2d, 6, "gelu", nonfinite="skip"), (4, 6, 3, 2)),
]


def placement(what: str) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return {"replicated": Replicate(), "partial": Partial()}.get(what) or Shard(int(what))


def mesh_of(shape: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def distributed(tensor: Tensor, mesh: Any, what: str) -> Any:
    """``tensor`` as a DTensor: placed as ``what`` on the mesh dimension of two ranks, replicated on the other."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [placement(what) if size == 2 else Replicate() for size in mesh.shape]
    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_(tensor.requires_grad)


def distribute_layer(layer: nn.Module, mesh: Any, what: str) -> nn.Module:
    for name, parameter in list(layer._parameters.items()):
        layer._parameters[name] = None if parameter is None else nn.Parameter(distributed(parameter, mesh, what))
    for name, buffer in list(layer._buffers.items()):
        if buffer is not None:
            layer._buffers[name] = distributed(buffer, mesh, what if buffer.dim() else "replicated")
    return layer


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor()  # type: ignore[no-any-return]


# Placements of the input, of the per-channel vectors, and of the output in training and in evaluation.
LAYOUTS = [
    ("0", "replicated", "replicated", "0"),
    ("1", "0", "1", "1"),
    ("0", "0", "1", "1"),
    ("replicated", "0", "1", "1"),
    ("replicated", "replicated", "replicated", "replicated"),
    ("2", "replicated", "replicated", "2"),
    ("1", "replicated", "replicated", "replicated"),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_batch_norm_equals_one_process(ranks: Ranks, layout: tuple[str, ...], training: bool) -> None:
    ranks.run(2, as_one_process, layout, training)


def as_one_process(layout: tuple[str, ...], training: bool) -> None:
    of_input, of_vectors, of_output = layout[0], layout[1], layout[2 if training else 3]
    for mesh in map(mesh_of, MESHES):
        for make, shape in CASES:
            torch.manual_seed(0)
            plain = make(dtype=torch.float64).train(training)
            with torch.no_grad():
                for p in plain.parameters():
                    p.normal_()
            layer = distribute_layer(copy.deepcopy(plain), mesh, of_vectors)
            x, r = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
            weight = torch.randn(shape, dtype=torch.float64)
            dx, dr = (distributed(t, mesh, of_input) for t in (x, r))
            y, expected = layer(dx, dr), plain(x, r)
            (y * distributed(weight, mesh, "replicated")).sum().backward()
            (expected * weight).sum().backward()
            assert y.placements[mesh.shape.index(2)] == placement(of_output)
            torch.testing.assert_close(whole(y), expected)
            torch.testing.assert_close(whole(dx.grad), x.grad)
            torch.testing.assert_close(whole(dr.grad), r.grad)
            for a, e in zip(layer.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(whole(a.grad), e.grad)
            for a, e in zip(layer.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(whole(a), e)


def test_without_running_statistics_the_input_decides_the_placement(ranks: Ranks) -> None:
    ranks.run(2, without_running_statistics)


def without_running_statistics() -> None:
    mesh, x = mesh_of((2,)), torch.randn(4, 6, 5)
    expected = functional.batch_norm(x, None, None, training=True)
    for what, of_output in (("0", "replicated"), ("1", "1"), ("replicated", "replicated"), ("2", "replicated")):
        y: Any = functional.batch_norm(distributed(x, mesh, what), None, None, training=True)
        assert y.placements == (placement(of_output),)
        torch.testing.assert_close(whole(y), expected)


def test_batches_and_channels_that_do_not_divide_evenly(ranks: Ranks) -> None:
    ranks.run(2, uneven)


def uneven() -> None:
    mesh = mesh_of((2,))
    layer = normfused.BatchNorm1d(5).eval()
    x = torch.randn(3, 5, 4)
    other = distribute_layer(copy.deepcopy(layer), mesh, "replicated")
    torch.testing.assert_close(whole(other(distributed(x, mesh, "0"))), layer(x))
    other = distribute_layer(copy.deepcopy(layer), mesh, "0")
    message = error_of(lambda: other(distributed(x, mesh, "1")))
    assert message == "ValueError: BatchNorm1d: 5 channels cannot be sharded evenly over the mesh (2,)"
    torch.testing.assert_close(
        whole(functional.channel_moments(distributed(x, mesh, "1")).mean), functional.channel_moments(x).mean
    )


def test_other_functions(ranks: Ranks) -> None:
    ranks.run(2, other_functions)


def other_functions() -> None:
    mesh, x = mesh_of((2,)), torch.randn(4, 6, 5, requires_grad=True)
    normalized = functional.local_response_norm(x, 3)
    normalized.square().sum().backward()
    for what, stays in (("0", True), ("1", False), ("2", True), ("replicated", True)):
        dx = distributed(x, mesh, what)
        y: Any = functional.local_response_norm(dx, 3)
        assert y.placements == (placement(what if stays else "replicated"),)
        torch.testing.assert_close(whole(y), normalized)
        y.square().sum().backward()
        torch.testing.assert_close(whole(dx.grad), x.grad)
        for function in (functional.channel_moments, functional.channel_sums):
            count, *vectors = function(dx)
            expected_count, *expected = function(x)
            assert count == expected_count
            for a, e in zip(vectors, expected, strict=True):
                assert a.placements == (placement("0" if what == "1" else "replicated"),)  # type: ignore[attr-defined]
                torch.testing.assert_close(whole(a), e)


def test_unsupported_calls_are_refused(ranks: Ranks) -> None:
    ranks.run(2, refused)


def refused() -> None:
    from torch.distributed.tensor import DTensor

    mesh, x = mesh_of((2,)), torch.randn(4, 6, 5)
    dx = distributed(x, mesh, "0")
    layer = distribute_layer(normfused.BatchNorm1d(6), mesh, "replicated")
    inplace = distribute_layer(normfused.BatchNorm1d(6, inplace=True), mesh, "replicated")
    images = distributed(torch.randn(2, 3, 4, 4), mesh, "0")
    partial = distribute_layer(normfused.BatchNorm1d(6), mesh, "replicated")
    partial.running_mean = DTensor.from_local(torch.zeros(6), mesh, [placement("partial")])
    mixed = distribute_layer(normfused.BatchNorm1d(6), mesh, "replicated")
    mixed.running_var = distributed(torch.ones(6), mesh, "0")
    unsupported = "mask, lengths and inplace are not supported for a DTensor"
    plain = "must be a plain tensor, got a DTensor; call it on input.to_local()"
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: normfused.BatchNorm1d(6)(dx), "TypeError: BatchNorm1d: running_mean must be a DTensor as input is"),
        (lambda: layer(dx, x), "TypeError: BatchNorm1d: residual must be a DTensor as input is, got Tensor"),
        (lambda: layer(dx, mask=torch.ones(4, 5).bool()), f"NotImplementedError: BatchNorm1d: {unsupported}"),
        (lambda: layer(dx, lengths=torch.ones(4).long()), f"NotImplementedError: BatchNorm1d: {unsupported}"),
        (lambda: inplace(dx), f"NotImplementedError: BatchNorm1d: {unsupported}"),
        (lambda: partial(dx), "ValueError: BatchNorm1d: running_mean must have the placements (Replicate(),)"),
        (lambda: mixed(dx), "ValueError: BatchNorm1d: running_var must have the placements (Replicate(),)"),
        (lambda: layer(distributed(x, mesh_of((1, 2)), "0")), "ValueError: BatchNorm1d: running_mean is on another"),
        (lambda: normfused.SyncBatchNorm(6)(dx), f"TypeError: SyncBatchNorm: input {plain}"),
        (lambda: normfused.normalize(images, 0.0, 1.0), f"TypeError: normalize: input {plain}"),
        (lambda: normfused.normalize_(images, 0.0, 1.0), f"TypeError: normalize_: input {plain}"),
    ]
    for call, message in cases:
        assert error_of(call).startswith(message), (error_of(call), message)
    for each in (layer, inplace, mixed):
        assert int(whole(each.num_batches_tracked)) == 0
