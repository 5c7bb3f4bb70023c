"""The calls of oneDNN for a case, in the layout that is fastest for it.

Two peers: ``onednn`` allocates its outputs in each call like every other peer, ``onednn_reused`` writes to existing
ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from cases import Call, Case, inputs, trained_norm
from torch import Tensor
from worker import Offer

from .library import Arrays, Norm, UnavailableError

LAYOUTS = {"nchw": 1, "nhwc": 1, "nChw8c": 8, "nChw16c": 16}  # channels per block
TRIALS = 3
SLOW = 2  # a layout whose first call takes this many times as long as the fastest is not tried further

TENSORS = ("dst", "diff_src")  # outputs of the input's shape
FORWARD_OUTPUTS = ("dst", "mean", "variance", "workspace")
BACKWARD_OUTPUTS = ("diff_src", "diff_scale", "diff_shift")
# By operation: what a call writes, and what it returns.
OUTPUTS = {
    "training_forward": (FORWARD_OUTPUTS, ("dst",)),
    "training_backward": (BACKWARD_OUTPUTS, BACKWARD_OUTPUTS),
    "eval_forward": (("dst",), ("dst",)),
}
FORWARD_BACKWARD = (FORWARD_OUTPUTS + BACKWARD_OUTPUTS, ("dst", *BACKWARD_OUTPUTS))


class Problem:
    """A case in one of oneDNN's layouts: its tensors, and the calls."""

    def __init__(self, case: Case, layout: str) -> None:
        self.case, self.layout = case, layout
        training = case.operation != "eval_forward"
        self.norm = Norm(case.shape, case.dtype, layout, relu="relu" in case.operation, training=training)
        x, grad_output, _ = inputs(case, "cpu")
        norm = trained_norm(x)
        self._tensors = {
            "src": self._converted(x),
            "diff_dst": self._converted(grad_output),
            "scale": norm.weight.detach(),
            "shift": norm.bias.detach(),
            "mean": norm.running_mean.clone(),
            "variance": norm.running_var.clone(),
        }
        self._arrays = Arrays()
        self._point(self._tensors)
        self._written, self._returned = OUTPUTS.get(case.operation, FORWARD_BACKWARD)
        if case.operation == "training_backward":  # its forward pass is not part of the call
            self._tensors |= self._new(FORWARD_OUTPUTS)
            self._point(self._tensors)
            self.norm.forward(self._arrays)

    def inputs(self) -> list[Tensor]:
        names = ("src", "diff_dst") if "backward" in self.case.operation else ("src",)
        return [self._tensors[name] for name in names]

    def fresh(self) -> list[Tensor]:
        """The timed call with new outputs."""
        return self._run(self._new(self._written))

    def reusing(self) -> Call:
        """The timed call with existing outputs."""
        outputs = self._new(self._written)
        return lambda: self._run(outputs)

    def plain(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Results with every tensor in torch's layout."""
        return [
            self._to_torch(r) if n in ("dst", "diff_src") else r for n, r in zip(self._returned, results, strict=True)
        ]

    def _run(self, outputs: dict[str, Tensor]) -> list[Tensor]:
        self._point(outputs)
        if "dst" in outputs:
            self.norm.forward(self._arrays)
        if "diff_src" in outputs:
            self.norm.backward(self._arrays)
        return [outputs[name] for name in self._returned]

    def _new(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensor = self._tensors["src"]
        new = {}
        for name in names:
            if name in TENSORS:
                new[name] = torch.empty_like(tensor)
            elif name == "workspace":
                new[name] = torch.empty(self.norm.workspace_bytes, dtype=torch.uint8)
            else:
                new[name] = torch.empty(self.case.shape[1])
        return new

    def _point(self, tensors: dict[str, Tensor]) -> None:
        """Makes the next call use these tensors. Who calls keeps them alive."""
        for name, tensor in tensors.items():
            setattr(self._arrays, name, tensor.data_ptr())

    def _converted(self, tensor: Tensor) -> Tensor:
        plain = tensor.contiguous()
        return self.norm.reorder(plain, torch.empty_like(plain), to_plain=False)

    def _to_torch(self, tensor: Tensor) -> Tensor:
        return self.norm.reorder(tensor, torch.empty_like(tensor), to_plain=True)


def build(case: Case) -> Offer:
    """Tries the layouts, and offers the fastest."""
    best: tuple[float, Problem] | None = None
    reason = "no layout"
    for layout, block in LAYOUTS.items():
        if case.shape[1] % block:
            continue
        try:
            problem = Problem(case, layout)
        except UnavailableError as error:
            reason = str(error)
            continue
        seconds = _trial(problem.reusing(), best[0] * SLOW if best else float("inf"))
        if best is None or seconds < best[0]:
            best = seconds, problem
    if best is None:
        return Offer({}, [], note=reason)
    problem = best[1]
    calls: dict[str, Call] = {"onednn": problem.fresh, "onednn_reused": problem.reusing()}
    return Offer(calls, problem.inputs(), problem.plain, f"{problem.layout}, {problem.norm.implementation}")


def _trial(call: Call, limit: float) -> float:
    """The minimum of some calls. Stops after one that takes longer than `limit`."""
    least = float("inf")
    call()
    for _ in range(TRIALS):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
        if least > limit:
            break
    return least
