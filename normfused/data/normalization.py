"""Normalization of images by constants: the functions, and the checked constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normfused import _extension, decompositions, reference
from normfused._torch_private import is_transformed, suggest_memory_format
from normfused.checks import DTYPES, INTEGERS, check_can_be_overwritten, check_device, needs_torchs_operators
from normfused.distributed import dtensor

_INTEGERS = (*INTEGERS, torch.uint16)


def normalize(
    input: Tensor,
    mean: float | Sequence[float] | Tensor,
    std: float | Sequence[float] | Tensor,
    *,  # independent options, each with a default
    scale: float | None = None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    out: Tensor | None = None,
) -> Tensor:
    """Compute ``(input * scale - mean) / std`` for each channel of images, in one pass from bytes to floats.

    This is the function behind :class:`normfused.transforms.Normalize`. Images are normalized by their own statistics
    with :class:`normfused.transforms.Standardize`.

    Args:
        input: shape ``(..., C, H, W)``, any strides, uint8, int8, int16, uint16, int32, int64, float32, float64,
            float16 or bfloat16. For an image of shape ``(H, W, C)`` pass ``image.permute(2, 0, 1)``; this makes no
            copy.
        mean, std: one number, or one per channel. A tensor, of shape ``(C,)`` or ``(C, 1, 1)``, is copied to the host,
            which on CUDA waits for the device. A tensor of shape ``(N, C)`` holds the constants of each image of a
            batch of shape ``(N, C, H, W)``.
        scale: factor of the input; default 1/255 for uint8, as in torchvision's ``ToTensor``, 1 otherwise.
        eps: minimum divisor: a ``std`` below it is replaced by it. With it a constant channel becomes 0.
        dtype: dtype of the output; default that of ``input``, float32 for integers.
        memory_format: ``torch.contiguous_format`` or ``torch.channels_last``; default that of ``input``.
        out: tensor that the output is written to, in its dtype and memory format, such as a slice of a batch or pinned
            memory. Excludes ``dtype``, ``memory_format`` and gradients.

    Returns:
        A new tensor of the shape of ``input``, or ``out``. Constants are not rounded to ``dtype``. The result for uint8
        is within 0.501 units in the last place of the exact one (1 unit on machines without fused multiply-add). It is
        differentiable with respect to a floating ``input``.

    Raises:
        ValueError: fewer than 3 dimensions; a number of constants that is neither 1 nor C; ``std`` that is not positive
            with ``eps=0``; a constant that is not finite.
        TypeError: an unsupported dtype.
        RuntimeError: ``out`` if ``input`` or ``out`` requires grad; a CUDA tensor if the extension has no CUDA kernels.

    Example:
        >>> import torch, normfused
        >>> image = torch.full((3, 2, 2), 255, dtype=torch.uint8)
        >>> normfused.normalize(image, mean=0.5, std=0.5).unique()
        tensor([1.])

    Source: https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.Normalize.html
    """
    constants = ImageConstants("normalize", mean, std, scale, eps)
    if out is None:
        return constants.normalize(input, dtype, memory_format)
    if dtype is not None or memory_format != torch.preserve_format:
        raise ValueError("normalize: out excludes dtype and memory_format")
    return constants.normalize_into(out, input)


def normalize_(
    input: Tensor,
    mean: float | Sequence[float] | Tensor,
    std: float | Sequence[float] | Tensor,
    *,
    scale: float = 1.0,
    eps: float = 0.0,
) -> Tensor:
    """:func:`normalize` in place: ``input``, of a floating dtype, is overwritten and returned.

    Args:
        input: shape ``(..., C, H, W)``, float32, float64, float16 or bfloat16.
        mean, std, scale, eps: as in :func:`normalize`.

    Raises:
        TypeError: integer input.
        RuntimeError: input that cannot be overwritten: a leaf that requires grad, or overlapping memory.
        ValueError: as :func:`normalize`.

    Example:
        >>> import torch, normfused
        >>> x = torch.ones(1, 1, 2)
        >>> normfused.normalize_(x, mean=0.0, std=2.0) is x
        True
        >>> x
        tensor([[[0.5000, 0.5000]]])
    """
    return ImageConstants("normalize_", mean, std, scale, eps).normalize_(input)


class ImageConstants:
    """Checked mean, standard deviation and scale, and the normalization by them. Error messages begin with ``name``.

    Raises:
        ValueError, TypeError: as :func:`normalize`.
    """

    def __init__(
        self,
        name: str,
        mean: float | Sequence[float] | Tensor,
        std: float | Sequence[float] | Tensor,
        scale: float | None = None,
        eps: float = 0.0,
    ) -> None:
        self.name = name
        # Of constants per image, self.mean and self.std hold those of all images, one after the other.
        self.images, (mean, std) = _of_images(name, mean, std)
        self.mean, self.std = (as_numbers(name, which, values) for which, values in (("mean", mean), ("std", std)))
        self.scale = scale
        if not 0 <= eps < math.inf:
            raise ValueError(f"{name}: eps must be a non-negative finite number, got {eps}")
        if scale is not None and not 0 < abs(scale) < math.inf:
            raise ValueError(f"{name}: scale must be a finite number other than 0, got {scale}")
        for channel, deviation in enumerate(self.std):
            if deviation < 0 or (deviation == 0 and eps == 0):
                hint = "; eps= maps a constant channel to 0" if deviation == 0 else ""
                raise ValueError(f"{name}: std must be above 0, got {deviation} for channel {channel}{hint}")
        self.std = [max(deviation, eps) for deviation in self.std]
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise ValueError(f"{name}: mean has {len(self.mean)} numbers, but std has {len(self.std)}")

    def normalize(
        self,
        input: Tensor,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        """:func:`normalize` without ``out``."""
        check_image(self.name, input)
        dtype = dtype or (input.dtype if input.dtype in DTYPES else torch.float32)
        if dtype not in DTYPES:
            raise TypeError(f"{self.name}: dtype must be float32, float64, float16 or bfloat16, got {dtype}")
        if memory_format not in (torch.preserve_format, torch.contiguous_format, torch.channels_last):
            raise ValueError(
                f"{self.name}: memory_format must be torch.contiguous_format, torch.channels_last or "
                f"torch.preserve_format, got {memory_format}"
            )
        if self.images is not None:
            parts = [x.normalize(image, dtype, torch.contiguous_format) for x, image in self._per_image(input)]
            if memory_format == torch.preserve_format:
                memory_format = suggest_memory_format(input)
            return torch.stack(parts).contiguous(memory_format=memory_format)
        scale = self._scale_of(input)
        if not _has_kernel(input.dtype, dtype):
            input = input.to(_common_dtype(input.dtype, dtype))
        direct = _has_kernel(input.dtype, dtype)
        mean, std = self._for_channels_of(input)
        images = input.flatten(0, -4) if input.dim() > 4 else input
        arguments = (images, mean, std, scale, dtype if direct else input.dtype, memory_format)
        compiling = torch.compiler.is_compiling()
        if needs_torchs_operators(compiling):
            output = decompositions.standardize(*arguments)
        elif _extension.C is None:
            output = reference.normalize(*arguments)
        else:
            operators = torch.ops.normfused if compiling else _extension.C
            output = operators.standardize(*arguments)
        output = output.view(input.shape) if input.dim() > 4 else output
        return output if direct else output.to(dtype)

    def normalize_into(self, out: Tensor, input: Tensor) -> Tensor:
        """:func:`normalize` with ``out``."""
        check_image(self.name, input)
        check_image(f"{self.name}: out", out, DTYPES)
        if out.shape != input.shape or out.device != input.device:
            raise ValueError(
                f"{self.name}: out must have input's shape {tuple(input.shape)} and be on {input.device}, "
                f"got {tuple(out.shape)} on {out.device}"
            )
        if torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
            raise RuntimeError(f"{self.name}: out excludes tensors that require grad")
        if self.images is not None:
            for (x, image), target in zip(self._per_image(input), out, strict=True):
                x.normalize_into(target, image)
            return out
        if input.dim() > 4 or not _has_kernel(input.dtype, out.dtype) or _extension.C is None or is_transformed():
            return out.copy_(self.normalize(input, out.dtype))
        mean, std = self._for_channels_of(input)
        operators = torch.ops.normfused if torch.compiler.is_compiling() else _extension.C
        operators.standardize_out(input, mean, std, self._scale_of(input), out)
        return out

    def normalize_(self, input: Tensor) -> Tensor:
        """:func:`normalize_`."""
        check_image(self.name, input, DTYPES)
        check_can_be_overwritten(self.name, input)
        if self.images is not None:
            for x, image in self._per_image(input):
                x.normalize_(image)
            return input
        mean, std = self._for_channels_of(input)
        if input.dim() > 4:
            for part in input:
                self.normalize_(part)
            return input
        if _extension.C is None or is_transformed():
            return input.copy_(reference.normalize(input.clone(), mean, std, self._scale_of(input)))
        operators = torch.ops.normfused if torch.compiler.is_compiling() else _extension.C
        operators.standardize_(input, mean, std, self._scale_of(input))
        return input

    def listed(self, which: str) -> list[Any]:
        """The ``"mean"`` or the ``"std"``: a list of numbers, or of such lists for constants of each image."""
        values: list[float] = getattr(self, which)
        if self.images is None or len(values) == 1:
            return values
        size = len(values) // self.images
        return [values[first : first + size] for first in range(0, len(values), size)]

    def _per_image(self, input: Tensor) -> list[tuple[ImageConstants, Tensor]]:
        """The constants of each image of a batch, and the image."""
        if input.dim() != 4 or input.size(0) != self.images:
            raise ValueError(
                f"{self.name}: constants for {self.images} images need input of shape ({self.images}, C, H, W), got "
                f"{tuple(input.shape)}"
            )
        images = []
        for index, image in enumerate(input):
            of_image = ImageConstants(self.name, 0.0, 1.0, self.scale)
            for which in ("mean", "std"):
                values = self.listed(which)
                setattr(of_image, which, values[index] if isinstance(values[0], list) else values)
            images.append((of_image, image))
        return images

    def _scale_of(self, input: Tensor) -> float:
        if self.scale is not None:
            return float(self.scale)
        return 1 / 255 if input.dtype == torch.uint8 else 1.0

    def _for_channels_of(self, input: Tensor) -> tuple[list[float], list[float]]:
        channels = input.size(-3)
        if len(self.mean) == channels == len(self.std):
            return self.mean, self.std
        for which, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 1 and len(values) != channels:  # Dynamo does not trace `in`
                raise ValueError(
                    f"{self.name}: {len(values)} {which}s for an input with {channels} "
                    f"channel{'s' * (channels != 1)} (dim -3 of shape {tuple(input.shape)})"
                )
        mean, std = (values * channels if len(values) == 1 else values for values in (self.mean, self.std))
        return mean, std


def _has_kernel(input: torch.dtype, output: torch.dtype) -> bool:
    """Whether a kernel exists for these dtypes of input and output."""
    return input == output or (input in (torch.uint8, torch.float32) and output != torch.float64)


def _common_dtype(input: torch.dtype, output: torch.dtype) -> torch.dtype:
    """A floating dtype that holds the values of both dtypes; of int64 as well as float64 can."""
    if input in (torch.int32, torch.int64):
        return torch.float64
    if input in _INTEGERS:
        return torch.promote_types(torch.float32, output)
    return torch.promote_types(input, output)


def _of_images(name: str, mean: Any, std: Any) -> tuple[int | None, list[Any]]:
    """The number of images of constants of shape (N, C), and the constants in one dimension; None for others."""
    shapes = [tuple(getattr(values, "shape", ())) for values in (mean, std)]
    images = {shape[0] for shape in shapes if len(shape) == 2}
    if not images:
        return None, [mean, std]
    for which, values, shape in zip(("mean", "std"), (mean, std), shapes, strict=True):
        if len(images) > 1 or (len(shape) != 2 and not isinstance(values, (int, float))):
            other = f"shape {shape}" if shape else repr(values)
            raise ValueError(f"{name}: {which} must be a number or of shape (N, C) as the other one, got {other}")
    return images.pop(), [v.reshape(-1) if len(s) == 2 else v for v, s in zip((mean, std), shapes, strict=True)]


def as_numbers(name: str, which: str, values: Any) -> list[float]:
    """A number, sequence, array or tensor, of shape (), (C,) or (C, 1, 1), as a list of finite floats."""
    if tuple(getattr(values, "shape", ()))[1:] == (1, 1):
        values = values[:, 0, 0]
    plain = values.tolist() if hasattr(values, "tolist") else values
    try:
        numbers = [float(plain)] if isinstance(plain, (int, float)) else [float(number) for number in plain]
    except (TypeError, ValueError):
        numbers = []
    if not numbers:
        raise TypeError(f"{name}: {which} must be a number or a sequence of numbers, got {values!r}")
    for channel, number in enumerate(numbers):
        if not -math.inf < number < math.inf:
            raise ValueError(f"{name}: {which} must be finite, got {number} for channel {channel}")
    return numbers


def check_image(name: str, input: Tensor, dtypes: tuple[torch.dtype, ...] = (*_INTEGERS, *DTYPES)) -> None:
    """Raise ``TypeError`` or ``ValueError`` if ``input`` is not a tensor of images ``(..., C, H, W)`` in ``dtypes``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}")
    dtensor.refuse(name, "input", input)
    if input.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: input must be one of {allowed}, got {input.dtype}")
    if input.dim() < 3:
        raise ValueError(f"{name}: input needs at least 3 dimensions (..., C, H, W), got shape {tuple(input.shape)}")
    check_device(input)
