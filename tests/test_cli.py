"""The command line: the output of each command, and the errors of bad arguments."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normfused
from normfused.cli.main import main


def test_info_prints_one_line_per_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    expected = [f"{key}: {value}" for key, value in normfused.info().items()]
    assert capsys.readouterr().out.splitlines() == expected


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    expected = json.loads(json.dumps(normfused.info(), default=str))
    assert json.loads(capsys.readouterr().out) == expected


def test_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "normfused", "demo", "--help"]
    # In another folder: in a checkout, -m would find the sources instead of the installed package.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: normfused demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: 'many' is not an integer"),
        (["--limit", "0"], "argument --limit: must be at least 1, got 0"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (
            ["--seed", str(2**63)],
            f"argument --seed: must be at most {2**63 - 1}, got {2**63}",
        ),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_option_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert stderr.endswith(f"error: {message}\n")


@pytest.mark.parametrize("option", ["--experiment", "--device"])
def test_bad_choice_names_option_and_value(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", option, "abacus"])
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert f"argument {option}: invalid choice: 'abacus'" in stderr


def test_missing_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("normfused: error: ")


def fails_with(message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    assert main(["demo", *arguments]) == 2
    printed = capsys.readouterr()
    return (printed.out, printed.err) == ("", f"normfused demo: error: {message}\n")


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fails_with("device cuda: torch finds no CUDA device", ["--device", "cuda"], capsys)


def test_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    message = f"cannot write to {file / 'out'}: Not a directory"
    assert fails_with(message, ["--out", str(file / "out")], capsys)


def test_missing_extra_names_package_and_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "matplotlib, scikit-learn, tqdm not installed: pip install 'normfused[demo]'"
    assert fails_with(message, [], capsys)


def test_missing_data_error_names_folders_and_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        f"no IDX files and no CIFAR-10 in {tmp_path}, {tmp_path}/FashionMNIST/raw, "
        f"{tmp_path}/cifar-10-batches-py, {tmp_path}/cifar-10-batches-bin; name another folder, "
        "or leave --data out (apt install dataset-fashion-mnist for Fashion-MNIST, else "
        "scikit-learn's digits)"
    )
    assert fails_with(message, ["--data", str(tmp_path)], capsys)
