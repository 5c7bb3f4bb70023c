"""Which CUDA kernels a shape launches, and the bytes that they move: pure functions, tested without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from normfused import _extension

# Multiprocessors, bytes of L2, bytes of shared memory of a block, blocks of a cluster.
H200 = (132, 50 << 20, 227 << 10, 8)
BLOCK_BYTES = 16 << 10

pytestmark = pytest.mark.usefixtures("needs_extension")


def plan(
    operation: str,
    view: tuple[int, int, int],
    itemsize: int,
    device: tuple[int, int, int, int] = H200,
    *,
    fused: bool = False,
) -> dict[str, Any]:
    assert _extension.C is not None
    result: dict[str, Any] = _extension.C.cuda_traffic(
        getattr(_extension.C.Operation, operation), view, itemsize, fused, *device
    )
    return result


# Every batch norm of ResNet-50 in bfloat16 at batch 256: threads of a channel or vectors of a tile, tiles, splits.
RESNET50 = {
    (64, 112): ((256, 64, 88), (8, 1, 262)),
    (64, 56): ((256, 64, 8), (8, 1, 262)),
    (256, 56): ((256, 256, 8), (8, 4, 66)),
    (128, 28): ((256, 128, 2), (8, 2, 392)),
    (512, 28): ((256, 512, 2), (8, 8, 33)),
    (256, 14): ((256, 256, 1), (8, 4, 66)),
    (1024, 14): ((256, 1024, 1), (8, 16, 16)),
    (512, 7): ((128, 256, 1), (4, 16, 8)),
    (2048, 7): ((128, 1024, 1), (4, 64, 8)),
}


@pytest.mark.parametrize(("channels", "side"), RESNET50)
def test_resnet50(channels: int, side: int) -> None:
    rows, columns = RESNET50[channels, side]
    first = plan("TRAINING", (256, channels, side * side), 2)
    assert (first["lanes"], first["tiles"], first["splits"]) == rows
    last = plan("TRAINING", (256 * side * side, channels, 1), 2)
    assert (last["width"], last["tiles"], last["splits"]) == columns
    assert first["values"] == last["values"] == 8
    assert first["single"] == (side < 112)
    assert first["pipelined"] == (side == 112)
    assert not last["pipelined"]
    assert last["single"] == (last["splits"] <= 8)
    assert last["persistent"] == ((channels, side) == (128, 28))
    assert first["masked"] == (side in (7, 14))
    assert not first["folded"]


@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("resident", [2, 3, 4])
def test_waves_of_blocks_are_full(channels: int, itemsize: int, channels_last: bool, resident: int) -> None:
    """A grid is one to four waves of resident blocks, and nearly full, if each block then has enough to read."""
    positions = (256 << 20) // (channels * itemsize)
    view = (positions, channels, 1) if channels_last else (256, channels, positions // 256)
    if channels == 1:
        view = (1, 1, positions)
    assert _extension.C is not None
    operation = _extension.C.Operation.MOMENTS
    chosen = _extension.C.cuda_traffic(operation, view, itemsize, False, *H200, resident=[resident] * 3)
    slots, blocks = resident * H200[0], chosen["tiles"] * chosen["splits"]
    waves = -(-blocks // slots)
    assert blocks >= 0.85 * waves * slots
    assert waves <= 4 or chosen["splits"] == 1


@pytest.mark.parametrize(("channels", "side"), RESNET50)
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_block_merges_many_splits(channels: int, side: int, batch: int, itemsize: int) -> None:
    for operation in ("TRAINING", "BACKWARD", "MOMENTS"):
        for view in ((batch, channels, side * side), (batch * side * side, channels, 1)):
            assert plan(operation, view, itemsize)["merged"] <= 32, view


def test_tiny_shapes_get_more_blocks() -> None:
    """A channel gets up to one thread per vector, and a tile is as narrow as a sector."""
    assert plan("TRAINING", (8, 64, 64), 4)["lanes"] == 128  # the number of vectors of a channel
    assert plan("TRAINING", (32, 64, 196), 4)["tiles"] == 64
    assert plan("TRAINING", (32, 2048, 64), 2)["lanes"] == 32  # enough blocks already
    assert plan("TRAINING", (64, 512, 1), 2)["width"] == 2


def test_blocks_have_enough_to_read() -> None:
    chosen = plan("MOMENTS", (100_000, 3, 1), 2)
    assert 100_000 * 3 * 2 / chosen["splits"] >= BLOCK_BYTES * 0.9
    assert plan("MOMENTS", (1000, 3, 1), 2)["splits"] == 1


def test_channels_that_do_not_fill_vectors_are_repeated() -> None:
    assert [plan("MOMENTS", (9999, c, 1), 2)["repeat"] for c in (3, 4, 6, 8, 12, 65)] == [8, 2, 4, 1, 2, 8]
    assert plan("MOMENTS", (9999, 3, 1), 4)["repeat"] == 4
    wide = plan("MOMENTS", (9999, 2049, 1), 2)  # repeated, they would not fit into one block
    assert (wide["repeat"], wide["values"]) == (1, 1)


def test_rows_that_do_not_fill_vectors_are_folded() -> None:
    """If the rows of all channels together fill vectors, and the rows of a few channels fit into a block."""
    for inner, values, width in ((49, 8, 49), (196, 8, 49), (7, 8, 14), (2, 8, 1)):
        chosen = plan("MOMENTS", (1024, 64, inner), 2)
        assert (chosen["folded"], chosen["values"], chosen["masked"]) == (True, values, False), inner
        assert chosen["width"] % width == 0 or inner < 8, inner
    assert not plan("MOMENTS", (99, 64, 64), 2)["folded"]  # rows are whole vectors
    assert plan("MOMENTS", (99, 12, 49), 2)["masked"]  # a row of all channels is not whole vectors
    assert plan("MOMENTS", (99, 64, 55 * 55), 2)["masked"]  # 8 channels of it are more than a block has threads
    assert plan("MOMENTS", (99, 3, 7), 2)["values"] == 1  # not whole vectors either, and shorter than a vector
    wide = plan("MOMENTS", (2, 512, 49), 2)  # so few rows that a tile is wider
    assert wide["width"] >= 98 or wide["tiles"] == 64


# Channels first and last; with more than a tile of the cache, and more than half of a device's shared memory.
@pytest.mark.parametrize("view", [(8, 64, 64), (512, 64, 1), (32, 512, 49), (32, 512, 784), (1568, 1024, 1)])
def test_channels_that_fit_shared_memory_need_one_launch(view: tuple[int, int, int]) -> None:
    size = view[0] * view[1] * view[2] * 4
    training, backward = plan("TRAINING", view, 4), plan("BACKWARD", view, 4)
    assert (training["single"], training["launches"]) == (True, 1)
    assert (backward["single"], backward["launches"]) == (True, 1)
    partials = 2 * 8 * view[1] * training["splits"]
    assert (training["read"], training["written"]) == (size + partials, size + partials)
    partials = 2 * 8 * view[1] * backward["splits"]
    assert (backward["read"], backward["written"]) == (2 * size + partials, size + partials)


def test_clusters_hold_what_a_block_does_not() -> None:
    """A cluster has the fewest blocks that hold a tile, at most eight."""
    for inner, splits in ((784, 1), (3136, 2), (6272, 4), (12544, 8)):
        chosen = plan("TRAINING", (32, 64, inner), 4)
        assert (chosen["single"], chosen["launches"], chosen["splits"]) == (True, 1, splits)
        assert chosen["staged_bytes"] <= H200[2] - (4 << 10)
    assert not plan("TRAINING", (32, 64, 14600), 4)["single"]
    columns = plan("TRAINING", (32 * 784, 128, 1), 4)  # half a cache line of each row
    assert (columns["width"], columns["splits"]) == (4, 8)
    assert not plan("TRAINING", (32, 64, 3136), 4, (*H200[:3], 1))["single"]


def test_one_launch_needs_shared_memory_and_blocks() -> None:
    """A block holds 100 kB of each channel, and backward twice as much."""
    view, half = (32, 512, 784), 113 << 10
    assert plan("TRAINING", view, 4)["staged_bytes"] == 25 * 256 * 16  # 24.5 vectors of 16 bytes for each thread
    assert plan("TRAINING", view, 4, (132, 50 << 20, half, 1))["single"]
    assert not plan("BACKWARD", view, 4, (132, 50 << 20, half, 1))["single"]
    assert not plan("TRAINING", view, 4, (132, 50 << 20, 100 << 10, 1))["single"]
    assert plan("TRAINING", (32, 44, 784), 4)["single"]  # a third of the multiprocessors has a block
    assert not plan("TRAINING", (32, 43, 784), 4)["single"]
    assert plan("TRAINING", (32, 3, 49), 4)["single"]  # small


def test_an_activation_has_wider_vectors() -> None:
    """Forward may write a mask, of which a byte is eight values."""
    fused = plan("TRAINING", (32, 512, 196), 4, fused=True)
    assert (fused["values"], fused["folded"], fused["single"]) == (8, True, True)
    assert (fused["tiles"], fused["staged_bytes"]) == (256, 7 * 256 * 32)  # 5 rows of 49 threads
    assert plan("BACKWARD", (32, 512, 196), 4, fused=True)["values"] == 4
    assert not plan("TRAINING", (32, 64, 64), 8, fused=True)["single"]  # doubles: too many states
    assert plan("TRAINING", (32, 64, 64), 8)["single"]


def test_traffic_of_a_large_tensor() -> None:
    """Counted by hand: 32 x 64 x 112 x 112 float32 values, 64 channels, 4 splits, two sums of 8 bytes per channel.

    On a device without clusters and with a large L2 cache, so that nothing is single, pipelined or persistent.
    """
    view, size, partials = (32, 64, 12544), 102_760_448, 4 * 64 * 2 * 8
    expected = {
        "TRAINING": (2, 2 * size + partials, size + partials),
        "INFERENCE": (1, size, size),
        "BACKWARD": (2, 4 * size + partials, size + partials),
        "INFERENCE_BACKWARD": (2, 3 * size + partials, size + partials),
        "MOMENTS": (1, size + 2 * partials, 2 * partials),
        "SUMS": (1, size + 2 * partials, 2 * partials),
    }
    for operation, (launches, read, written) in expected.items():
        counted = plan(operation, view, 4, (H200[0], 200 << 20, H200[2], 1))
        assert not counted["single"]
        assert not counted["pipelined"]
        assert (counted["launches"], counted["read"], counted["written"]) == (launches, read, written), operation


def test_tensors_that_exceed_the_cache_are_pipelined() -> None:
    """If the channels do not fit shared memory, but a few of them fit the L2 cache together."""
    view, size = (256, 64, 12544), 256 * 64 * 12544 * 2
    for operation, inputs in (("TRAINING", 1), ("BACKWARD", 2)):
        chosen = plan(operation, view, 2)
        assert (chosen["pipelined"], chosen["single"], chosen["launches"]) == (True, False, 1), operation
        partials = 2 * 8 * 64 * chosen["splits"]
        assert (chosen["read"], chosen["written"]) == (inputs * size + partials, size + partials)
        tile = inputs * size // 64
        assert chosen["window"] * tile >= 264 * (48 << 10)  # what a wave of blocks reads
        assert (chosen["window"] + 1) * tile <= (50 << 20) * 3 // 4
        assert 0.95 * 264 < chosen["window"] * chosen["splits"] < 1.5 * 264
        assert plan(operation, view, 2, fused=True)["pipelined"]
    assert plan("TRAINING", view, 4)["pipelined"]
    assert not plan("BACKWARD", view, 4)["pipelined"]  # 25 MB of each channel
    assert not plan("INFERENCE", view, 2)["pipelined"]
    assert not plan("INFERENCE_BACKWARD", view, 2)["pipelined"]  # of the sums, only parameters' gradients depend
    assert not plan("TRAINING", (256, 64, 12543), 2)["pipelined"]  # vectors have values of two channels
    assert not plan("TRAINING", (256 * 12544, 64, 1), 2)["pipelined"]
    assert not plan("TRAINING", (1000, 2, 1000), 4, (108, 1 << 20, 0, 1))["pipelined"]  # two tiles at most


def test_a_pipelined_launch_needs_a_tensor_of_twice_the_cache() -> None:
    size = 32 * 64 * 12544 * 4
    for l2_bytes, expected in ((size // 2, True), (size // 2 + 1, False)):
        assert plan("TRAINING", (32, 64, 12544), 4, (108, l2_bytes, 163 << 10, 1))["pipelined"] == expected


def test_steps_of_a_pipelined_launch_have_32_bits() -> None:
    """Tiles of 8 channels of 16 values: 2^28 steps, or 2^31, which are refused."""
    for channels, expected in ((2**30, True), (2**33, False)):
        chosen = plan("TRAINING", (2, channels, 8), 2, (132, 50 << 20, 0, 1))
        assert (chosen["pipelined"], chosen["tiles"]) == (expected, channels // 8)


@pytest.mark.parametrize(
    ("operation", "samples", "itemsize", "vectors", "each"),
    [("TRAINING", 32, 2, 17, 3), ("TRAINING", 24, 4, 22, 4), ("BACKWARD", 16, 2, 8, 3)],
)
def test_a_matrix_that_shared_memory_holds_a_part_of_is_persistent(
    operation: str, samples: int, itemsize: int, vectors: int, each: int
) -> None:
    """Every block, two on a multiprocessor, keeps one of a few splits of at most so many vectors per thread."""
    view, inputs = (samples * 12544, 64, 1), 2 if operation == "BACKWARD" else 1
    size = inputs * samples * 12544 * 64 * itemsize
    chosen = plan(operation, view, itemsize)
    assert (chosen["persistent"], chosen["single"], chosen["launches"]) == (True, False, 1)
    assert chosen["blocks"] == 264
    assert 264 * (each - 1) < chosen["tiles"] * chosen["splits"] <= 264 * each
    assert 0.98 * size <= each * chosen["kept"] <= each * 264 * vectors * 256 * 16 * inputs
    partials = 2 * 8 * 64 * chosen["splits"]
    assert (chosen["read"], chosen["written"]) == (2 * size - chosen["kept"] + partials, size // inputs + partials)
    # With an activation, vectors are eight values, so that float32 has more states, and less memory for copies.
    assert plan(operation, view, itemsize, fused=True)["persistent"] == (itemsize == 2)


def test_other_tensors_are_not_persistent() -> None:
    view = (32 * 12544, 64, 1)
    assert not plan("TRAINING", view, 4)["persistent"]  # a block would keep one of five splits
    assert not plan("INFERENCE", view, 2)["persistent"]
    assert not plan("TRAINING", view, 2, (132, 50 << 20, 100 << 10, 8))["persistent"]  # too little shared memory
    assert not plan("TRAINING", (32, 64, 12544), 2)["persistent"]
    assert not plan("TRAINING", (32 * 12544, 64 * 300, 1), 2, (132, 50 << 20, 227 << 10, 1))["persistent"]


def test_a_persistent_launch_needs_a_tensor_beyond_half_of_the_cache() -> None:
    view, size = (32 * 12544, 64, 1), 32 * 12544 * 64 * 2
    for l2_bytes, expected in ((2 * size - 2, True), (2 * size, False)):
        assert plan("TRAINING", view, 2, (132, l2_bytes, 227 << 10, 1))["persistent"] == expected


def test_partial_results_are_a_small_part_of_the_traffic() -> None:
    for (channels, side), _ in RESNET50.items():
        for view in ((32, channels, side * side), (32 * side * side, channels, 1)):
            size = view[0] * view[1] * view[2] * 2
            counted = plan("TRAINING", view, 2)
            again = 0 if counted["single"] or counted["pipelined"] else size - counted["kept"]
            assert counted["read"] + counted["written"] <= 1.05 * (2 * size + again), view


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


def group_plan(
    view: tuple[int, int, int, int], *, channels_last: bool = False, itemsize: int = 4, backward: bool = False
) -> dict[str, Any]:
    """The plan for (samples, groups, channels, positions)."""
    assert _extension.C is not None
    result: dict[str, Any] = _extension.C.cuda_group_norm_plan(view, channels_last, itemsize, backward, *H200)
    return result


def layer_plan(
    view: tuple[int, int, int], *, samples: int = 1, itemsize: int = 4, backward: bool = False
) -> dict[str, Any]:
    assert _extension.C is not None
    result: dict[str, Any] = _extension.C.cuda_layer_norm_plan(view, samples, itemsize, backward, *H200)
    return result


# Group norms of diffusion models in bfloat16, published ones among them: lanes or width, tiles, splits; channels first,
# unless a block or a cluster holds a statistic, and channels last.
GROUP_NORMS = {
    (2, 32, 320, 64 * 64): (None, (5, 16, 2)),
    (2, 32, 1280, 16 * 16): (None, (5, 64, 1)),
    (1, 32, 128, 256 * 256): (None, (8, 2, 128)),
    (1, 32, 128, 20 * 256 * 256): ((256, 32, 8), (8, 2, 132)),
    (1, 32, 512, 16 * 180 * 320): ((256, 32, 8), (8, 8, 33)),
}


@pytest.mark.parametrize("view", GROUP_NORMS)
def test_group_norms_fill_the_device(view: tuple[int, int, int, int]) -> None:
    """A statistic is divided among many blocks if there are few of them."""
    first, last = GROUP_NORMS[view]
    chosen = group_plan(view, itemsize=2)
    if first is None:
        assert chosen["launches"] == 1
    else:
        assert (chosen["lanes"], chosen["tiles"], chosen["splits"]) == first
    chosen = group_plan(view, channels_last=True, itemsize=2)
    assert (chosen["width"], chosen["tiles"], chosen["splits"]) == last
    assert chosen["values"] == 8


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_plan_of_a_sample_does_not_depend_on_the_batch(channels_last: bool, backward: bool, itemsize: int) -> None:
    """Only the number of tiles does: how the values of a statistic are summed is the same in every batch."""
    for groups, channels, inner in ((32, 320, 4096), (3, 6, 35), (64, 64, 49), (1, 96, 3136), (5, 5, 16384)):
        plans = [
            group_plan((n, groups, channels, inner), channels_last=channels_last, itemsize=itemsize, backward=backward)
            for n in (1, 2, 7, 300)
        ]
        summed = [
            {k: p[k] for k in ("launches", "by_rows", "values", "lanes", "width", "splits", "chunk")} for p in plans
        ]
        assert all(one == summed[0] for one in summed)
        if backward or channels_last or plans[0]["launches"] > 1:  # the tiles of a reduction
            assert plans[3]["tiles"] > plans[0]["tiles"]


def test_statistics_that_fit_into_registers_are_read_once() -> None:
    size = 2 * 1280 * 256 * 4
    chosen = group_plan((2, 32, 1280, 256))
    assert (chosen["launches"], chosen["read"], chosen["written"]) == (1, size, size)
    assert group_plan((4, 32, 32, 128 * 128))["launches"] == 1  # instance norm: 16,384 values
    assert not group_plan((4, 32, 32, 128 * 128))["is_staged"]
    assert group_plan((4, 32, 32, 128 * 130))["is_staged"]
    assert group_plan((2, 32, 1280, 256), channels_last=True)["launches"] == 1
    assert group_plan((2, 32, 1280, 256), channels_last=True, backward=True)["launches"] == 3
    assert group_plan((2, 3, 6, 256), channels_last=True)["launches"] == 3  # a position has one vector and a half
    assert group_plan((2, 1, 4096, 4), channels_last=True)["launches"] == 3  # more vectors than a block has threads
    assert group_plan((2, 4, 64, 3))["launches"] == 3  # a vector can have values of three channels


def test_statistics_that_fit_shared_memory_are_read_once() -> None:
    """55 vectors of four values for each of 256 threads, in up to 8 blocks of a cluster."""
    for inner, chunks in ((56_320, 1), (56_324, 2), (112_640, 2), (112_648, 4), (450_560, 8)):
        chosen = group_plan((4, 32, 32, inner))
        assert (chosen["launches"], chosen["is_staged"], chosen["chunks"]) == (1, True, chunks)
    assert group_plan((4, 32, 32, 450_564))["launches"] == 3
    assert group_plan((4, 32, 320, 4096))["launches"] == 1
    for itemsize, inner, splits in ((2, 4096, 1), (4, 4096, 2), (4, 8192, 4), (4, 16384, 8)):
        held = group_plan((4, 32, 320, inner), itemsize=itemsize, backward=True)
        assert (held["launches"], held["splits"]) == (3, splits)
    assert group_plan((4, 32, 320, 32768), backward=True)["launches"] == 6


def test_traffic_of_group_norm() -> None:
    """Counted by hand: 2 x 320 x 320 x 320 float32 values in 64 statistics. Forward has four sums, backward two."""
    view, size = (2, 32, 320, 102400), 262_144_000
    forward, backward = group_plan(view), group_plan(view, backward=True)
    partials = forward["splits"] * 4 * 64 * 8
    assert (forward["launches"], forward["read"], forward["written"]) == (3, 2 * size + partials, size + partials)
    partials = backward["splits"] * 2 * 640 * 8
    assert (backward["launches"], backward["read"], backward["written"]) == (6, 4 * size + partials, size + partials)
    assert partials < 0.01 * size
    # In one launch each block of a cluster writes three numbers, and reads those of its cluster.
    held, size = group_plan((2, 32, 320, 25600)), 65_536_000
    partials = held["chunks"] * 64 * 24
    assert (held["chunks"], held["read"], held["written"]) == (8, size + 8 * partials, size + partials)
    view, size = (2, 32, 1280, 256), 2_621_440
    held, sums = group_plan(view, backward=True), 2 * 2560 * 8
    assert (held["launches"], held["read"], held["written"]) == (3, 2 * size + sums, size + sums)


# Rows of layer norm in float32: vectors of a thread, lanes, threads of a block, chunks, blocks; forward and backward.
LAYER_ROWS = {
    (64, 96): ((2, 16, 256, 1, 4), (1, 32, 256, 1, 8)),
    (4096, 768): ((8, 32, 256, 1, 512), (4, 64, 256, 1, 264)),
    (8192, 1024): ((8, 32, 256, 1, 1024), (4, 64, 256, 1, 264)),
    (2048, 4096): ((8, 128, 256, 1, 1024), (4, 256, 256, 1, 264)),
    (2048, 8192): ((8, 256, 256, 1, 2048), (4, 512, 512, 1, 132)),
    (16, 64 * 256 * 256): ((8, 512, 512, 256, 16), (4, 512, 512, 512, 1)),
}


@pytest.mark.parametrize("shape", LAYER_ROWS)
def test_rows_of_layer_norm(shape: tuple[int, int]) -> None:
    rows, channels = shape
    for backward, expected in zip((False, True), LAYER_ROWS[shape], strict=True):
        chosen = layer_plan((rows, channels, 1), backward=backward)
        assert tuple(chosen[k] for k in ("vectors", "lanes", "threads", "chunks", "blocks")) == expected
        assert chosen["values"] == 4
        held = chosen["lanes"] * chosen["vectors"] * chosen["values"]
        assert chosen["chunk"] <= held < 2 * channels + 512
        assert chosen["chunk"] * chosen["chunks"] >= channels


@pytest.mark.parametrize("channels", [1, 3, 8, 65, 768, 2049, 4096, 8192, 100_000])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_the_plan_of_a_row_does_not_depend_on_the_batch(channels: int, itemsize: int) -> None:
    for backward in (False, True):
        plans = [layer_plan((n, channels, 1), itemsize=itemsize, backward=backward) for n in (1, 5, 300, 100_000)]
        assert len({tuple(p[k] for k in ("values", "vectors", "lanes", "chunk", "chunks")) for p in plans}) == 1
        assert all(p["threads"] % 32 == 0 and p["threads"] <= 512 for p in plans)
        plans = [layer_plan((n, channels, 49), itemsize=itemsize, backward=backward) for n in (1, 5, 300)]
        assert len({tuple(p[k] for k in ("values", "width", "height", "tiles")) for p in plans}) == 1


def test_a_block_sums_few_rows_in_float() -> None:
    for rows, channels in ((1_000_000, 768), (50_000_000, 16), (3, 8)):
        chosen = layer_plan((rows, channels, 1), backward=True)
        slots = chosen["threads"] // chosen["lanes"]
        assert rows / (chosen["blocks"] * slots) <= 64
        assert chosen["blocks"] < 2**31
    for outer, channels, inner in ((32, 96, 3136), (4096, 96, 3136), (1, 3, 5)):
        chosen = layer_plan((outer, channels, inner), backward=True)
        assert outer * chosen["tiles"] / chosen["blocks"] <= 64


def test_parameters_by_sample_have_blocks_of_their_own() -> None:
    assert layer_plan((4096, 768, 1), samples=16, backward=True)["blocks"] == 16  # of each sample
    assert layer_plan((16, 96, 3136), samples=16, backward=True)["blocks"] == 16
    assert layer_plan((4096, 768, 1), samples=4096, backward=True)["blocks"] == 1


def test_traffic_of_layer_norm() -> None:
    """Counted by hand: rows that are held in registers are read once. The sums of blocks are written and read once."""
    size = 4096 * 768 * 4
    forward, backward = layer_plan((4096, 768, 1)), layer_plan((4096, 768, 1), backward=True)
    sums = 264 * 2 * 768 * 4
    assert (forward["launches"], forward["read"], forward["written"]) == (1, size, size)
    assert (backward["launches"], backward["read"], backward["written"]) == (4, 2 * size + sums, size + sums)
    for values, launches in ((100_000, 1), (500_000, 2)):  # a cluster holds the first
        long, size = layer_plan((16, values, 1)), 16 * values * 4
        assert (long["launches"], long["read"], long["written"]) == (launches, launches * size, size)
    columns, size = layer_plan((32, 96, 3136), backward=True), 32 * 96 * 3136 * 4
    sums = columns["blocks"] * 2 * 96 * 4
    assert (columns["launches"], columns["read"], columns["written"]) == (4, 2 * size + sums, size + sums)
