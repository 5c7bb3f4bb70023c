"""The examples, run as README runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_demo import idx_bytes
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
EXAMPLE = Path(__file__).parent.parent / "examples/ddp_fashion_mnist.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of ten classes that can be told apart, as Fashion-MNIST's files."""
    folder = tmp_path_factory.mktemp("data")
    labels = torch.arange(1200) % 10
    images = torch.randint(0, 120, (1200, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 6] += 80
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images.byte()))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.byte()))
    return folder


def start(launcher: list[str], folder: Path, *options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, str(EXAMPLE), *map(str, options)],
        cwd=folder,  # in the checkout the folder normfused has no extension
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in its background leaves them an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """What it printed; nothing of its session is left."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
    assert not left, output
    return output


def run(launcher: list[str], folder: Path, *options: Any) -> list[dict[str, float]]:
    process = start(launcher, folder, *options, "--json", folder / "curve.json")
    output = end(process)
    assert process.returncode == 0, output
    curve: list[dict[str, float]] = json.loads((folder / "curve.json").read_text())
    return curve


def test_two_processes_train_as_one_and_go_on_where_they_were(data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--batch", 100)
    alone = run([sys.executable], tmp_path, *options, "--epochs", 2)
    shared = run(TORCHRUN, tmp_path, *options, "--epochs", 2)
    assert len(alone) == len(shared) == 2
    for one, two in zip(alone, shared, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 0.02 * one["loss"] + 0.002
    assert shared[1]["accuracy"] > 0.8
    checkpoint = ("--checkpoint", tmp_path / "kept.pt")
    assert run(TORCHRUN, tmp_path, *options, *checkpoint, "--epochs", 1) == shared[:1]
    assert run(TORCHRUN, tmp_path, *options, *checkpoint, "--epochs", 2, "--resume") == shared


def test_interrupted_training_leaves_a_whole_checkpoint_and_no_process(data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.pt"
    process = start(TORCHRUN, tmp_path, "--data", data, "--batch", 100, "--epochs", 1000, "--checkpoint", kept)
    patience = time.monotonic() + 120
    while not kept.exists() and time.monotonic() < patience and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output = end(process)
    assert "interrupted in epoch" in output
    assert "ddp_fashion_mnist.py" not in output.split("interrupted in epoch")[0]  # no traceback from there
    assert len(torch.load(kept, weights_only=True)["curve"]) >= 1


def test_nothing_to_go_on_from(data: Path, tmp_path: Path) -> None:
    process = start([sys.executable], tmp_path, "--resume", "--checkpoint", "none.pt")
    assert "--resume: there is no checkpoint none.pt" in end(process)
    assert process.returncode == 2
