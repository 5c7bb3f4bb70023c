"""The implementations that normfused is compared with, and the cases that each of them covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from cases import BASIC, STATISTICS, Case


@dataclass(frozen=True)
class Peer:
    title: str
    covers: Callable[[Case], bool] = lambda case: True


def _mkldnn_covers(case: Case) -> bool:
    # to_mkldnn makes any tensor contiguous: channels_last would repeat NCHW.
    return (
        case.operation in ("training_forward", "eval_forward")
        and (case.dtype, case.layout) == (torch.float32, "NCHW")
        and len(case.shape) == 4
    )


def _onednn_covers(case: Case) -> bool:
    # oneDNN 3.2 fuses the addition on GPUs only.
    return (
        case.operation not in (*STATISTICS, "add_relu_forward_backward")
        and case.dtype in (torch.float32, torch.bfloat16)
        and len(case.shape) == 4
    )


PEERS = {
    "torch": Peer("torch"),
    "kept": Peer("torch with kept pages"),
    "mkldnn": Peer("torch via to_mkldnn", _mkldnn_covers),
    "onednn": Peer("oneDNN", _onednn_covers),
    "onednn_reused": Peer("oneDNN into existing outputs", _onednn_covers),
    "native": Peer("torch without cuDNN"),
    # A compiled backward cannot run twice on one graph.
    "compile": Peer("torch.compile", lambda case: case.operation != "training_backward"),
    "copy": Peer("copy"),
    "clone": Peer("clone"),
}
REQUIRED = ("torch", "copy")  # every figure is relative to one of them
LOCAL = BASIC[1:]
REMOTE = ("kept", "mkldnn", "onednn", "onednn_reused")  # CPU only, in processes of their own: see processes.py
DEFAULT = {"cpu": (*LOCAL, *REMOTE), "cuda": LOCAL}


def peer_names(case: Case, peers: Sequence[str] = LOCAL) -> list[str]:
    """normfused, followed by those of the peers that cover the case."""
    return ["normfused", *(name for name, peer in PEERS.items() if name in peers and peer.covers(case))]


def not_measured(missing: Mapping[str, str]) -> list[str]:
    """One line per reason, from the reasons by peer."""
    peers = {reason: [PEERS[peer].title for peer in missing if missing[peer] == reason] for reason in missing.values()}
    return [f"Not measured: {' and '.join(titles)}. {reason}" for reason, titles in peers.items()]
