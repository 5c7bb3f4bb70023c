"""Layouts of images in tensors and arrays."""

from __future__ import annotations

import re
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_OF_TENSORS = {2: "HW", 3: "CHW", 4: "NCHW"}
_OF_ARRAYS = {2: "HW", 3: "HWC", 4: "NHWC"}
_OTHERS = {3: ("CHW", "HWC", "NHW"), 4: ("NCHW", "NHWC", "CDHW")}
FEW_CHANNELS = range(1, 5)  # gray and RGB, with and without alpha

_DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def check_layout(layout: str) -> str:
    """``layout`` if it is valid: distinct letters, each of which names a dimension.

    N are the images, C the channels, all others are dimensions of an image, such as D, H and W or time T.

    Raises:
        ValueError: any other string.
    """
    if not (isinstance(layout, str) and re.fullmatch("[A-Z]+", layout) and len(set(layout)) == len(layout)):
        raise ValueError(
            f"layout must consist of distinct letters, N for images, C for channels and any other for a dimension of "
            f"an image, such as 'NCHW', 'HWC' or 'CDHW'; got {layout!r}"
        )
    return layout


def guess_layout(images: Tensor | np.ndarray, option: str = "layout=") -> str:
    """The default layout: channels first for tensors, last for arrays. Errors name the ``option`` that sets another.

    Raises:
        ValueError: not 2 to 4 dimensions; more than 4 channels, because any other layout is as likely then.
    """
    kind, guesses = ("tensors", _OF_TENSORS) if isinstance(images, Tensor) else ("arrays", _OF_ARRAYS)
    shape = tuple(images.shape)
    if len(shape) not in guesses:
        raise ValueError(f"images need 2, 3 or 4 dimensions, got shape {shape}: for others pass {option}")
    layout = guesses[len(shape)]
    if "C" not in layout or shape[layout.index("C")] in FEW_CHANNELS:
        return layout
    ways = [f"{other!r} for {_described(other, shape)}" for other in _OTHERS[len(shape)]]
    raise ValueError(
        f"images of shape {shape} would have {shape[layout.index('C')]} channels in layout {layout}, the default for "
        f"{kind}: pass {option}, such as {', '.join(ways[:-1])} or {ways[-1]}"
    )


def _described(layout: str, shape: tuple[int, ...]) -> str:
    letter, noun = ("C", "channel") if "C" in layout else ("N", "grayscale image")
    count = shape[layout.index(letter)]
    return f"{count} {noun}{'s' if count != 1 else ''}{' of a volume' if 'D' in layout else ''}"


def as_nchw(images: Any, layout: str | None) -> Tensor:
    """``images`` as a tensor of shape (N, C, ...); a copy only if torch cannot view them.

    Arguments and errors are those of :meth:`ChannelStats.update`.
    """
    images = as_array(images)
    layout = check_layout(layout) if layout is not None else guess_layout(images)
    shape = tuple(images.shape)
    if len(layout) != len(shape):
        raise ValueError(f"layout={layout!r} needs {len(layout)} dimensions, got images of shape {shape}")
    if 0 in shape:
        raise ValueError(f"images of shape {shape} have no values")
    x = _from_numpy(images) if isinstance(images, np.ndarray) else images
    if x.dtype == torch.uint16:
        x = x.to(torch.int32)  # few functions of torch support uint16
    return _arranged(x, layout)


def _arranged(x: Tensor, layout: str) -> Tensor:
    """A view of shape (N, C, ...)."""
    for name in "CN":
        if name not in layout:
            x, layout = x.unsqueeze(0), name + layout
    return x.movedim((layout.index("N"), layout.index("C")), (0, 1))


def mask_as_nchw(mask: Any, images: Tensor | np.ndarray, layout: str | None) -> Tensor:
    """A mask of ``images`` as a tensor of shape (N, C, ...), with one channel if it has no C.

    Raises:
        TypeError: the mask is not bool.
        ValueError: another shape than that of the images, or that without C.
    """
    layout, shape = layout or guess_layout(images), tuple(images.shape)
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.ascontiguousarray(mask))
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = str(getattr(mask, "dtype", type(mask).__name__)).removeprefix("torch.")
        raise TypeError(f"mask must be a bool tensor or array, got {kind}")
    of_all_channels = layout.replace("C", "")
    without = tuple(size for size, letter in zip(shape, layout, strict=True) if letter != "C")
    if tuple(mask.shape) not in (shape, without):
        raise ValueError(f"mask must have the shape {shape} of the images, or {without}, got {tuple(mask.shape)}")
    return _arranged(mask, layout if tuple(mask.shape) == shape else of_all_channels)


def as_array(images: Any) -> Tensor | np.ndarray:
    """A tensor or array unchanged; anything else, such as a PIL image, as an array. Checks the dtype."""
    if getattr(images, "mode", None) in ("P", "PA"):
        raise ValueError("a palette image contains indices, not colors: convert it to RGB first")
    if isinstance(images, np.ma.MaskedArray):
        if masked := int(np.sum(images.mask)):
            raise ValueError(f"a masked array with {masked} masked values, which cannot be left out")
        images = images.data
    if not isinstance(images, (Tensor, np.ndarray)):
        images = np.array(images)
    dtype = images.dtype.name if isinstance(images, np.ndarray) else str(images.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"images must be of {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {dtype}")
    return cast("Tensor | np.ndarray", images)


def _from_numpy(array: np.ndarray) -> Tensor:
    # torch accepts neither reversed byte order nor negative strides.
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about writing to a read-only array; the tensor is only read
        return torch.from_numpy(array)
