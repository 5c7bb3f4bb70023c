"""Layouts of images in tensors and arrays."""

from __future__ import annotations

import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

LAYOUTS = ("HW", "CHW", "HWC", "NHW", "NCHW", "NHWC", "NC")
_OF_TENSORS = {2: "HW", 3: "CHW", 4: "NCHW"}
_OF_ARRAYS = {2: "HW", 3: "HWC", 4: "NHWC"}
_SWAPPED = {"CHW": "HWC", "HWC": "CHW", "NCHW": "NHWC", "NHWC": "NCHW"}
_FEW_CHANNELS = range(1, 5)  # gray and RGB, with and without alpha

_DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def guess_layout(images: Tensor | np.ndarray) -> str:
    """The default layout: channels first for tensors, last for arrays.

    Raises:
        ValueError: not 2 to 4 dimensions; more than 4 channels, while the other layout would have 1 to 4.
    """
    kind, guesses = ("tensors", _OF_TENSORS) if isinstance(images, Tensor) else ("arrays", _OF_ARRAYS)
    shape = tuple(images.shape)
    if len(shape) not in guesses:
        raise ValueError(f"images need 2, 3 or 4 dimensions, got shape {shape}")
    layout = guesses[len(shape)]
    other = _SWAPPED.get(layout)
    if other is not None:
        guessed, swapped = shape[layout.index("C")], shape[other.index("C")]
        if guessed not in _FEW_CHANNELS and swapped in _FEW_CHANNELS:
            raise ValueError(
                f"images of shape {shape} would have {guessed} channels in layout {layout}, the default for {kind}: "
                f"pass layout={other!r} for {swapped} channels, or layout={layout!r} for {guessed}"
            )
    return layout


def as_nchw(images: Any, layout: str | None) -> Tensor:
    """``images`` as a tensor of shape (N, C, ...); a copy only if torch cannot view them.

    Arguments and errors are those of :meth:`ChannelStats.update`.
    """
    images = as_array(images)
    layout = layout or guess_layout(images)
    shape = tuple(images.shape)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if len(layout) != len(shape):
        raise ValueError(f"layout={layout!r} needs {len(layout)} dimensions, got images of shape {shape}")
    if 0 in shape:
        raise ValueError(f"images of shape {shape} have no values")
    x = _from_numpy(images) if isinstance(images, np.ndarray) else images
    if x.dtype == torch.uint16:
        x = x.to(torch.int32)  # few functions of torch support uint16
    for name in "CN":
        if name not in layout:
            x, layout = x.unsqueeze(0), name + layout
    return x.movedim(layout.index("C"), 1)


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
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about writing to a read-only array; the tensor is only read
        return torch.from_numpy(array)
