"""Checks an installed wheel: the extension loads without a warning, and layers agree with torch's in both passes.

python -I -W error smoke.py VERSION
"""

from __future__ import annotations

import copy
import sys
from importlib.metadata import version

import torch

import normfused


def compare(layer: torch.nn.Module, expected: torch.nn.Module, x: torch.Tensor) -> None:
    """Compare output and gradients of a layer and of torch's, in training, after copying the parameters."""
    for parameter in expected.parameters():
        torch.nn.init.normal_(parameter)
    layer.load_state_dict(expected.state_dict())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(input) for module, input in zip((layer, expected), inputs, strict=True)]
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(layer.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


info = normfused.info()
assert info["extension"] == "loaded", info
assert info["built_version"] == version("normfused") == sys.argv[1], info

torch.manual_seed(0)
x = torch.randn(4, 6, 5, 7)
layers = {
    "BatchNorm2d": (6,),
    "GroupNorm": (3, 6),
    "LayerNorm": ([5, 7],),
    "RMSNorm": (7,),
    "LocalResponseNorm": (3,),
}
for name, arguments in layers.items():
    expected = getattr(torch.nn, name)(*arguments)
    for dense in (x, x.to(memory_format=torch.channels_last)):
        compare(getattr(normfused, name)(*arguments), copy.deepcopy(expected), dense)
fused = normfused.BatchNormAct2d(6, "relu")(x, x)
torch.testing.assert_close(fused, torch.relu(torch.nn.BatchNorm2d(6)(x) + x))
print(f"{info['normfused']} with torch {info['torch']}: {', '.join(layers)} agree with torch's")
