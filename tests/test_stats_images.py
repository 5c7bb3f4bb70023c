"""Images that ChannelStats accepts and rejects. Runs on the fallback too."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from pixels import BOOLS, CHW, HWC, OTHER_CHANNELS, assert_close, exact_sums

from normfused import ChannelStats


class LikePillow:
    """The attributes of a PIL image that are used."""

    def __init__(self, array: np.ndarray, mode: str = "RGB") -> None:
        self.mode = mode
        self.__array_interface__ = array.__array_interface__


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("images", "layout", "count"),
    [
        (CHW, None, 1),
        (CHW.contiguous(), None, 1),
        (CHW.contiguous(), "CHW", 1),
        (CHW.contiguous().numpy(), "CHW", 1),
        (torch.from_numpy(HWC), "HWC", 1),
        (torch.from_numpy(HWC)[None], "NHWC", 1),
        (CHW[None].expand(2, -1, -1, -1), None, 2),
        (HWC, None, 1),
        (HWC[None], None, 1),
        (HWC[::-1], None, 1),
        (read_only(HWC), None, 1),
        (np.asfortranarray(HWC), None, 1),
        (LikePillow(HWC), None, 1),
        (HWC.reshape(-1, 3), "NC", HWC.shape[0] * HWC.shape[1]),
    ],
)
def test_layouts(images: Any, layout: str | None, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = ChannelStats().update(images, layout)
    expected = exact_sums(HWC.reshape(-1, 3))
    copies = count if count == 2 else 1
    assert stats.sums == tuple(s if copies == 1 else s.merge(s) for s in expected)
    assert stats.images == count


@pytest.mark.parametrize(
    ("images", "layout"),
    [(HWC[..., 0], None), (CHW[0], None), (CHW[0], "HW"), (HWC[None, ..., 0], "NHW"), (HWC[..., :1], None)],
)
def test_grayscale(images: Any, layout: str | None) -> None:
    stats = ChannelStats().update(images, layout)
    assert (stats.sums, stats.images) == (exact_sums(HWC[..., 0].reshape(-1, 1)), 1)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4", "<u2", ">f8"])
def test_reversed_bytes(dtype: str) -> None:
    stats = ChannelStats(scale=1).update((HWC.astype(np.int64) + 200).astype(dtype))
    assert_close(stats.mean, HWC.reshape(-1, 3).mean(0) + 200, rtol=2e-6)


def test_input_is_not_written() -> None:
    before = HWC.copy()
    ChannelStats().update(read_only(HWC)).update(HWC)
    assert (before == HWC).all()


BATCH = (
    "images of shape (64, 28, 28) would have 64 channels in layout CHW, the default for tensors: "
    "pass layout=, such as 'CHW' for 64 channels, 'HWC' for 28 channels or 'NHW' for 64 grayscale images"
)
VOLUME = (
    "images of shape (1, 64, 32, 32) would have 64 channels in layout NCHW, the default for tensors: "
    "pass layout=, such as 'NCHW' for 64 channels, 'NHWC' for 32 channels or 'CDHW' for 1 channel of a volume"
)
BAD_IMAGES = [
    (torch.zeros(3, 4, 4, dtype=torch.bool), None, TypeError, BOOLS + "bool"),
    (np.zeros((4, 4), dtype=bool), None, TypeError, BOOLS + "bool"),
    (torch.zeros(3, 4, 4, dtype=torch.complex64), None, TypeError, BOOLS + "complex64"),
    (np.zeros((4, 4), dtype=np.uint32), None, TypeError, BOOLS + "uint32"),
    ("picture.png", None, TypeError, BOOLS + "str352"),
    (torch.zeros(4), None, ValueError, "images need 2, 3 or 4 dimensions, got shape (4,): for others pass layout="),
    (
        np.zeros((1, 2, 3, 4, 5)),
        None,
        ValueError,
        "images need 2, 3 or 4 dimensions, got shape (1, 2, 3, 4, 5): for others pass layout=",
    ),
    (torch.zeros(3, 0, 4), None, ValueError, "images of shape (3, 0, 4) have no values"),
    (torch.zeros(0, 3, 4, 4), None, ValueError, "images of shape (0, 3, 4, 4) have no values"),
    (
        torch.zeros(32, 32, 3),
        None,
        ValueError,
        "images of shape (32, 32, 3) would have 32 channels in layout CHW, the default for tensors: "
        "pass layout=, such as 'CHW' for 32 channels, 'HWC' for 3 channels or 'NHW' for 32 grayscale images",
    ),
    (
        np.zeros((3, 32, 32)),
        None,
        ValueError,
        "images of shape (3, 32, 32) would have 32 channels in layout HWC, the default for arrays: "
        "pass layout=, such as 'CHW' for 3 channels, 'HWC' for 32 channels or 'NHW' for 3 grayscale images",
    ),
    (
        np.zeros((8, 1, 28, 28)),
        None,
        ValueError,
        "images of shape (8, 1, 28, 28) would have 28 channels in layout NHWC, the default for arrays: "
        "pass layout=, such as 'NCHW' for 1 channel, 'NHWC' for 28 channels or 'CDHW' for 8 channels of a volume",
    ),
    *(
        (
            torch.zeros(3, 4, 4),
            layout,
            ValueError,
            "layout must consist of distinct letters, N for images, C for channels and any other for a dimension of an "
            f"image, such as 'NCHW', 'HWC' or 'CDHW'; got {layout!r}",
        )
        for layout in ("CHC", "chw", "", "C W", 3)
    ),
    # A batch of grayscale images, which a loader makes of items of shape (28, 28), and a volume.
    (torch.zeros(64, 28, 28), None, ValueError, BATCH),
    (torch.zeros(1, 64, 32, 32), None, ValueError, VOLUME),
    (
        torch.zeros(4, 4),
        "CHW",
        ValueError,
        "layout='CHW' needs 3 dimensions, got images of shape (4, 4)",
    ),
    (
        LikePillow(HWC[..., 0].copy(), "P"),
        None,
        ValueError,
        "a palette image contains indices, not colors: convert it to RGB first",
    ),
]


@pytest.mark.parametrize(
    ("images", "layout", "kind", "message"), BAD_IMAGES, ids=[case[3][-60:] for case in BAD_IMAGES]
)
def test_bad_images(images: Any, layout: str | None, kind: type[Exception], message: str) -> None:
    stats = ChannelStats()
    with pytest.raises(kind) as error:
        stats.update(images, layout)
    assert str(error.value) == message
    assert stats == ChannelStats()


def test_unusual_shapes() -> None:
    assert ChannelStats().update(torch.zeros(32, 32, 3), "CHW").channels == 32
    assert ChannelStats().update(torch.zeros(13, 32, 32), "CHW").channels == 13


def test_other_number_of_channels() -> None:
    stats = ChannelStats().update(CHW)
    before = pickle.loads(pickle.dumps(stats))
    for change in (lambda: stats.update(CHW[:1]), lambda: stats.merge(ChannelStats().update(CHW[0]))):
        with pytest.raises(ValueError, match=f"^{OTHER_CHANNELS}$"):
            change()
    assert stats == before


def test_inconsistent_scales() -> None:
    stats = ChannelStats().update(CHW)
    with pytest.raises(ValueError, match=r"^uint8 is scaled by 1/255, other integers by 1: pass scale= "):
        stats.update(CHW.int())
    with pytest.raises(ValueError, match=r"^cannot merge scale=1 into scale=None$"):
        stats.merge(ChannelStats(scale=1))
    both = ChannelStats(scale=1).update(CHW).update(CHW.int())
    assert both.sums == tuple(s.merge(s) for s in stats.sums)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "1/255"])
def test_bad_scale(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^scale must be a positive number or None, got "):
        ChannelStats(scale)


@pytest.mark.parametrize("result", ["mean", "min", "max", "count", "nonfinite", "var", "std"])
def test_results_without_images(result: str) -> None:
    stats = ChannelStats()
    with pytest.raises(ValueError, match=r"^no images yet$"):
        getattr(stats, result)() if result in ("var", "std") else getattr(stats, result)
    assert (stats.channels, stats.images, stats.sums, str(stats)) == (None, 0, (), "no images yet")


def test_masked_arrays() -> None:
    images = np.ma.masked_array(HWC, np.zeros(HWC.shape, bool))
    assert ChannelStats().update(images).sums == exact_sums(HWC.reshape(-1, 3))
    images.mask[0, 0] = True
    assert ChannelStats().update(images).sums == exact_sums(HWC.reshape(-1, 3)[1:])
