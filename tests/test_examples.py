"""The examples: training on two processes equals training in one, resumes, and stops cleanly when interrupted."""

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
    """Images of ten classes that a network can learn, in the format of Fashion-MNIST's files."""
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
        cwd=folder,  # not the checkout: its normfused/ may have no compiled extension
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Processes in the background of a shell inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """Returns the output of the process, and checks that no process of its session remains."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            remaining = True
        except ProcessLookupError:
            remaining = False
    assert not remaining, output
    return output


def run(launcher: list[str], folder: Path, *options: Any) -> list[dict[str, float]]:
    """Returns accuracy and loss of each epoch."""
    process = start(launcher, folder, *options, "--json", folder / "curve.json")
    output = end(process)
    assert process.returncode == 0, output
    curve: list[dict[str, float]] = json.loads((folder / "curve.json").read_text())
    return curve


@pytest.mark.exhaustive
def test_training_on_two_processes_equals_one_process_and_resumes_from_a_checkpoint(data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--batch", 100)
    one_process = run([sys.executable], tmp_path, *options, "--epochs", 2)
    two_processes = run(TORCHRUN, tmp_path, *options, "--epochs", 2)
    assert len(one_process) == len(two_processes) == 2
    for one, two in zip(one_process, two_processes, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 0.02 * one["loss"] + 0.002
    assert two_processes[1]["accuracy"] > 0.8
    checkpoint = ("--checkpoint", tmp_path / "saved.pt")
    assert run(TORCHRUN, tmp_path, *options, *checkpoint, "--epochs", 1) == two_processes[:1]
    assert run(TORCHRUN, tmp_path, *options, *checkpoint, "--epochs", 2, "--resume") == two_processes


@pytest.mark.exhaustive
def test_interrupted_training_leaves_a_valid_checkpoint_and_no_process(data: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.pt"
    process = start(TORCHRUN, tmp_path, "--data", data, "--batch", 100, "--epochs", 1000, "--checkpoint", saved)
    deadline = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output = end(process)
    assert "interrupted in epoch" in output
    assert "ddp_fashion_mnist.py" not in output.split("interrupted in epoch")[0]  # no traceback
    assert len(torch.load(saved, weights_only=True)["curve"]) >= 1


def test_resume_without_a_checkpoint_is_an_error(data: Path, tmp_path: Path) -> None:
    process = start([sys.executable], tmp_path, "--resume", "--checkpoint", "none.pt")
    assert "--resume: checkpoint not found: none.pt" in end(process)
    assert process.returncode == 2
