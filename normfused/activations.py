"""The activations that can follow a normalization, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

# Name to function of the input and one parameter. The order is that of the kernels' table.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": lambda z, _: F.hardswish(z),
    "sigmoid": lambda z, _: z.sigmoid(),
    "tanh": lambda z, _: z.tanh(),
    "silu": lambda z, _: z * z.sigmoid(),  # F.silu's backward has no forward-mode derivative
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
}
# Default parameters: negative slope of leaky ReLU, alpha of ELU. The other activations have no parameter.
ACTIVATION_PARAMS = {"leaky_relu": 0.01, "elu": 1.0}
