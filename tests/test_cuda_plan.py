"""What CUDA kernels would be launched for a shape, and the bytes they would move: pure functions, tested anywhere."""

from __future__ import annotations

from typing import Any

import pytest

from normfused import _extension

H200 = (132, 50 << 20)  # multiprocessors, bytes of L2
BLOCK_BYTES = 16 << 10

pytestmark = pytest.mark.usefixtures("needs_extension")


def plan(operation: str, view: tuple[int, int, int], itemsize: int, device: tuple[int, int] = H200) -> dict[str, Any]:
    assert _extension.C is not None
    result: dict[str, Any] = _extension.C.cuda_traffic(
        getattr(_extension.C.Operation, operation), view, itemsize, *device
    )
    return result


# Every batch norm of ResNet-50 in bfloat16 at batch 256: threads of a channel or vectors of a tile, tiles, splits.
RESNET50 = {
    (64, 112): ((256, 64, 9), (8, 1, 526)),
    (64, 56): ((256, 64, 9), (8, 1, 523)),
    (256, 56): ((256, 256, 3), (8, 4, 132)),
    (128, 28): ((256, 128, 5), (8, 2, 262)),
    (512, 28): ((256, 512, 2), (8, 8, 66)),
    (256, 14): ((256, 256, 3), (8, 4, 131)),
    (1024, 14): ((256, 1024, 1), (8, 16, 33)),
    (512, 7): ((128, 256, 3), (8, 8, 66)),
    (2048, 7): ((128, 1024, 1), (8, 32, 17)),
}


@pytest.mark.parametrize(("channels", "side"), RESNET50)
def test_resnet50(channels: int, side: int) -> None:
    rows, columns = RESNET50[channels, side]
    first = plan("TRAINING", (256, channels, side * side), 2)
    assert (first["lanes"], first["tiles"], first["splits"]) == rows
    last = plan("TRAINING", (256 * side * side, channels, 1), 2)
    assert (last["width"], last["tiles"], last["splits"]) == columns
    assert first["values"] == last["values"] == 8
    assert first["masked"] == (side in (7, 14))


@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_device_is_filled_whatever_the_channels(channels: int, itemsize: int, channels_last: bool) -> None:
    """Four blocks to a multiprocessor, where each then has enough to read."""
    positions = (256 << 20) // (channels * itemsize)
    view = (positions, channels, 1) if channels_last else (256, channels, positions // 256)
    if channels == 1:
        view = (1, 1, positions)
    chosen = plan("MOMENTS", view, itemsize)
    blocks = chosen["tiles"] * chosen["splits"]
    assert blocks >= 4 * H200[0] * 0.95
    assert blocks <= 4 * H200[0] + 2 * chosen["tiles"] + chosen["splits"]


def test_blocks_have_enough_to_read() -> None:
    chosen = plan("MOMENTS", (100_000, 3, 1), 2)
    assert 100_000 * 3 * 2 / chosen["splits"] >= BLOCK_BYTES * 0.9
    assert plan("MOMENTS", (1000, 3, 1), 2)["splits"] == 1


def test_channels_that_do_not_fill_vectors_stand_side_by_side() -> None:
    assert [plan("MOMENTS", (9999, c, 1), 2)["repeat"] for c in (3, 4, 6, 8, 12, 65)] == [8, 2, 4, 1, 2, 8]
    assert plan("MOMENTS", (9999, 3, 1), 4)["repeat"] == 4
    wide = plan("MOMENTS", (9999, 2049, 1), 2)  # side by side they would not fit into one block
    assert (wide["repeat"], wide["values"]) == (1, 1)


def test_rows_shorter_than_a_vector_are_read_by_value() -> None:
    assert plan("MOMENTS", (99, 64, 7), 2)["values"] == 1
    assert plan("MOMENTS", (99, 64, 8), 2)["values"] == 8
    assert not plan("MOMENTS", (99, 64, 7), 2)["masked"]


@pytest.mark.parametrize("view", [(8, 64, 64), (512, 64, 1), (32, 512, 49)])
def test_small_channels_take_one_launch(view: tuple[int, int, int]) -> None:
    size = view[0] * view[1] * view[2] * 4
    training, backward = plan("TRAINING", view, 4), plan("BACKWARD", view, 4)
    assert (training["single"], training["launches"]) == (True, 1)
    assert (backward["single"], backward["launches"]) == (True, 1)
    partials = 2 * 8 * view[1]
    assert (training["read"], training["written"]) == (size + partials, size + partials)
    assert (backward["read"], backward["written"]) == (2 * size + partials, size + partials)


def test_traffic_of_a_large_tensor() -> None:
    """32 x 64 x 112 x 112 in float32, 102,760,448 bytes: by hand, 64 channels in 9 splits with two sums of 8 bytes."""
    view, size, partials = (32, 64, 12544), 102_760_448, 9 * 64 * 2 * 8
    expected = {
        "TRAINING": (2, 2 * size + partials, size + partials),
        "INFERENCE": (2, size, size),
        "BACKWARD": (2, 4 * size + partials, size + partials),
        "INFERENCE_BACKWARD": (2, 3 * size + partials, size + partials),
        "MOMENTS": (1, size + 2 * partials, 2 * partials),
        "SUMS": (1, size + 2 * partials, 2 * partials),
    }
    for operation, (launches, read, written) in expected.items():
        counted = plan(operation, view, 4)
        assert not counted["single"]
        assert (counted["launches"], counted["read"], counted["written"]) == (launches, read, written), operation


def test_partial_results_are_a_small_part_of_the_traffic() -> None:
    for (channels, side), _ in RESNET50.items():
        for view in ((32, channels, side * side), (32 * side * side, channels, 1)):
            size = view[0] * view[1] * view[2] * 2
            counted = plan("TRAINING", view, 2)
            assert counted["read"] + counted["written"] <= 1.05 * (2 if counted["single"] else 3) * size, view


def test_outputs_that_do_not_fit_the_cache_are_streamed() -> None:
    assert not plan("TRAINING", (32, 64, 3136), 4)["streaming_stores"]
    assert plan("TRAINING", (32, 64, 12544), 4)["streaming_stores"]


@pytest.mark.parametrize("numel", [2**31 - 8, 2**31, 2**31 + 8])
@pytest.mark.parametrize("channels", [1, 8, 131072])
def test_more_values_than_32_bits_count(numel: int, channels: int) -> None:
    for view in ((numel // channels, channels, 1), (2, channels, numel // channels // 2)):
        chosen = plan("TRAINING", view, 2)
        assert 0 < chosen["splits"] <= 65535
        assert 0 < chosen["tiles"] < 2**31
        assert chosen["read"] >= 2 * numel * 0.99
