"""Samples of torch's OpInfo and ModuleInfo tests on which torch and normfused differ, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from definitions import HALF, SINGLE

ALL = (*HALF, *SINGLE)
OTHER_DTYPES = (torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Difference:
    """Samples on which only one of torch and normfused passes, and the reason."""

    reason: str
    matches: Callable[[str, str, torch.dtype, Any], bool]
    torch_passes: bool = True


def is_vector(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    has_channels = not name.endswith(("layer_norm", "rms_norm"))
    return has_channels and sample.input.dim() == 1 and generator != "jacobian, reverse" and dtype != torch.bool


def is_of_integers(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    return name.endswith("response_norm") and (
        dtype == torch.int64 or (dtype in OTHER_DTYPES and sample.input.numel() == 0)
    )


def is_second_derivative_through_jvp(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    return (
        generator in ("vjp of jvp", "jvp of jvp")
        and (
            (name.endswith("batch_norm") and sample.kwargs.get("training", False))
            or (name.endswith("instance_norm") and sample.kwargs.get("running_mean") is None)
        )
        and sample.input.numel() > 0
    )


THROUGH_JVP = ("vjp of jvp", "jvp of jvp", "jvp of vmap of vjp")
# torch's own operator updates buffers that a transform has captured; the kernel here writes them afterwards.
TRANSFORMS = ("vjp", "jvp", "vjp of vjp", "jvp of vjp", "make_fx")
TRANSFORMS = (*TRANSFORMS, "functionalize", "functionalize of vjp")
TRANSFORMS += tuple(f"composite compliance, {kind}" for kind in ("subclass", "backward", "forward mode"))


def updates_captured_statistics(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    given = sample.kwargs
    updates = given.get("running_mean") is not None and given.get("use_input_stats", True)
    return name.endswith("instance_norm") and updates and generator in TRANSFORMS


def is_second_derivative_through_jvp_of_layers(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    if generator not in THROUGH_JVP or not name.endswith("layer_norm") or sample.input.numel() == 0:
        return False
    has_parameters = len(sample.args) > 1
    return sample.kwargs.get("eps", 0) >= 0 and (has_parameters or generator != "jvp of vmap of vjp")


def is_empty_jacobian(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    return generator == "jacobian, forward" and name.endswith("group_norm") and sample.input.size(0) == 0


def is_complex(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    return generator == "dtypes" and name.endswith("rms_norm") and dtype.is_complex


def is_negative_eps(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    torch_fails = name.endswith("layer_norm") and generator in THROUGH_JVP
    return sample.kwargs.get("eps", 0) < 0 and dtype in ALL and not torch_fails


DIFFERENCES = [
    Difference("torch has no batching rule for an empty group norm's forward mode", is_empty_jacobian, False),
    Difference("a negative eps is refused", is_negative_eps),
    Difference("complex numbers are not normalized", is_complex),
    Difference("transforms cannot capture running statistics of instance norm", updates_captured_statistics),
    Difference(
        "torch's forward mode of layer norm treats the statistics as constants, so derivatives of it are wrong",
        is_second_derivative_through_jvp_of_layers,
        torch_passes=False,
    ),
    Difference("a vector, even without elements, has no channels", is_vector),
    Difference("integers, and dtypes that torch accepts without elements alone, are not normalized", is_of_integers),
    Difference(
        "torch's forward mode treats the batch's statistics as constants, so derivatives of it are wrong",
        is_second_derivative_through_jvp,
        torch_passes=False,
    ),
]

# ---- modules ---------------------------------------------------------------------------------------------------------


def is_zero_eps(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    is_error_of_training = generator == "errors" and name.endswith("training")
    return is_error_of_training and sample.module_error_input.constructor_input.kwargs.get("eps") == 0


def is_empty_batch(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    compared = name.endswith("training") and generator in ("forward", "gradients", "non-contiguous", "state_dict")
    return generator != "errors" and sample.desc == "zero_batch" and compared


def is_half_image(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    return (
        generator in ("forward", "memory format") and name.startswith("Local") and dtype in HALF and sample.desc != "1d"
    )


def is_contiguous_rms_norm(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    return generator == "memory format" and name.startswith("RMSNorm") and sample.forward_input.args[0].dim() in (4, 5)


def is_instance_norm_of_images(generator: str, name: str, dtype: torch.dtype, sample: Any) -> bool:
    if generator != "memory format" or not name.startswith(("InstanceNorm2d", "InstanceNorm3d")):
        return False
    return sample.forward_input.args[0].dim() == int(name[12]) + 2


MODULE_DIFFERENCES = [
    Difference("the result of RMS norm is contiguous, as that of layer norm", is_contiguous_rms_norm),
    Difference("torch's instance norm does not keep channels last", is_instance_norm_of_images, torch_passes=False),
    Difference("eps=0 is accepted in training too", is_zero_eps),
    Difference("an empty batch changes no buffer; torch counts it in num_batches_tracked", is_empty_batch),
    Difference(
        "torch has no pooling of half precision for images on the CPU",
        is_half_image,
        torch_passes=False,
    ),
]
