"""Forks, signals, a second import, the end of a process, and processes that share a cache."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import environment, python, value

from normfused.cli import demo
from normfused.cli.main import main

# ---- fork -------------------------------------------------------------------------------------

# A step on 2 MiB, whose output uses the memory pool, while two threads train and OpenMP has two threads. A forked
# child has none of them, so it sets torch's number of threads to 1, as DataLoader's workers do. If it hangs, it prints
# the stacks of its threads and ends.
TRAINING = """
import faulthandler, json, multiprocessing, os, threading, torch, normfused
torch.manual_seed(0)
torch.set_num_threads(2)
x, residual = torch.randn(8, 64, 32, 32), torch.randn(8, 64, 32, 32)

def step(_=None):
    leaf = x.clone().requires_grad_()
    layer = normfused.BatchNormAct2d(64, "relu")
    y = layer(leaf, residual)
    gradients = torch.autograd.grad(y.sin().sum(), [leaf, *layer.parameters()])
    return [y.detach(), *gradients, *layer.buffers(), normfused.channel_moments(x).m2]

def is_right(_=None):
    return all(map(torch.equal, step(), expected))

def in_child(_=None):
    faulthandler.dump_traceback_later(60, exit=True)
    torch.set_num_threads(1)
    return is_right() and is_right()

expected, stop = step(), threading.Event()

def work():
    while not stop.is_set():
        step()

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
"""
END = """
still_right = is_right()
stop.set()
for thread in threads:
    thread.join()
print(json.dumps([results, still_right]))
"""


def assert_prints(expected: object, script: str) -> None:
    done = python(script)
    assert json.loads(done.stdout or "null") == expected, done.stderr  # which has the stacks of a child that hangs


@pytest.mark.usefixtures("needs_extension")
def test_a_fork_while_threads_train() -> None:
    fork = """
results = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if in_child() else 1)
    results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert_prints([[0] * 5, True], TRAINING + fork + END)


@pytest.mark.usefixtures("needs_extension")
def test_multiprocessing_and_dataloader_fork_while_threads_train() -> None:
    fork = """
class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.tensor(in_child())

with multiprocessing.get_context("fork").Pool(2) as pool:
    results = pool.map(in_child, range(2))
loader = torch.utils.data.DataLoader(Steps(), num_workers=2, multiprocessing_context="fork")
results += [bool(right) for right in loader]
"""
    assert_prints([[True] * 6, True], TRAINING + fork + END)


# ---- signals, within one process; test_stats_command.py has the real ones -------------------------


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def exit_code(*arguments: Any) -> object:
    try:
        return main(list(map(str, arguments)))
    except SystemExit as ended:
        return ended.code
    except KeyboardInterrupt as error:  # which would end pytest
        return error


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", np.zeros((3, 4, 4, 3), dtype=np.uint8))
    return tmp_path / "images.npy"


SIGNALS = pytest.mark.parametrize(
    ("sent", "message"), [(signal.SIGINT, "normfused: interrupted\n"), (signal.SIGTERM, "")]
)


def raising(sent: signal.Signals) -> Callable[..., Any]:
    return lambda *arguments, **options: signal.raise_signal(sent)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also if the tests run in the background of a shell, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@SIGNALS
@pytest.mark.parametrize("place", ["normfused.cli.stats.open_source", "normfused.cli.stats._check_outputs"])
def test_a_signal_before_the_first_image(
    sent: signal.Signals,
    message: str,
    place: str,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, raising(sent))
    assert exit_code("stats", images) == 128 + sent
    assert capsys.readouterr() == ("", message)


@SIGNALS
def test_a_signal_while_results_are_written(
    sent: signal.Signals,
    message: str,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither the new file nor a part of it is left; the former one stays."""
    out = images.with_name("out.json")
    out.write_text("former")
    write = Path.write_bytes

    def interrupted(self: Path, content: bytes) -> None:
        write(self, content[:10])
        signal.raise_signal(sent)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    assert exit_code("stats", images, "--json", out) == 128 + sent
    assert entries(out.parent) == ["images.npy", "out.json"]
    assert out.read_text() == "former"
    assert capsys.readouterr().err == message


@SIGNALS
@pytest.mark.parametrize("place", ["find_dataset", "train"])
def test_a_signal_in_the_demo(
    sent: signal.Signals,
    message: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, place, raising(sent))
    assert exit_code("demo", "--out", tmp_path / "out") == 128 + sent
    if place == "train" and sent == signal.SIGINT:
        message = f"\ninterrupted: 0 of 4 runs are complete and saved in {tmp_path / 'out'}\n"
    assert capsys.readouterr().err == message


def test_the_command_restores_handlers_and_respects_those_of_its_caller(capsys: pytest.CaptureFixture[str]) -> None:
    for handler in (signal.SIG_DFL, signal.SIG_IGN, lambda *_: None):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            assert main(["info"]) == 0
            assert signal.getsignal(signal.SIGTERM) == handler
        finally:
            signal.signal(signal.SIGTERM, before)


# ---- import and exit --------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_extension")
def test_a_second_import_of_the_package() -> None:
    """After the package is deleted from sys.modules. The binary is loaded and its operators are registered once."""
    script = """
import json, sys, torch, normfused
x = torch.randn(4, 3, 5, 5)
expected, first = normfused.BatchNormAct2d(3, "relu")(x), normfused
for name in [name for name in sys.modules if name.split(".")[0] == "normfused"]:
    del sys.modules[name]
import normfused
layer = normfused.BatchNormAct2d(3, "relu")
results = [layer(x), torch.compile(layer, backend="aot_eager", fullgraph=True)(x), first.BatchNormAct2d(3, "relu")(x)]
shape = torch.ops.normfused.group_norm(torch.empty(2, 6, 4, device="meta"), 2, None, None, 1e-5)[0].shape
print(json.dumps([normfused is not first, normfused.info()["extension"], list(shape),
                  [torch.equal(result, expected) for result in results]]))
"""
    assert value(script) == [True, "loaded", [2, 6, 4], [True, True, True]]


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.usefixtures("needs_extension")
def test_exits_with_outputs_of_other_threads(count: int) -> None:
    """Processes end in the usual way, with exit code 0 and without a message, whatever still holds an output."""
    script = (
        f"for_all = range({count})"
        + """
import atexit, json, os, sys, threading
atexit.register(lambda: step())  # runs after the functions that torch registers
import torch, normfused
atexit.register(lambda: step())
torch.set_num_threads(1)

def step():
    leaf = torch.ones(16, 64, 32, 32).requires_grad_()
    return normfused.BatchNormAct2d(64, "relu")(leaf)

codes = []
for _ in for_all:
    child = os.fork()
    if child == 0:
        break
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(json.dumps(codes))
    sys.exit()

held, local, ready = [], threading.local(), threading.Barrier(5)

class Cycle:
    def __init__(self):
        self.y, self.me = step(), self

def allocate(wait):
    y = local.y = step()
    held.extend([y, y.grad_fn, Cycle(), y.detach().numpy()])
    ready.wait()
    if wait:
        threading.main_thread().join(0.2)  # this thread ends while the interpreter waits for it
    y.sum().backward()

for wait in (False, False, True, True):
    threading.Thread(target=allocate, args=(wait,)).start()
ready.wait()
torch.kept = sys.modules["kept"] = held[0]
"""
    )
    done = python(script)
    assert (done.stdout, done.stderr) == (f"{[0] * count}\n", "")


# ---- caches -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_extension")
def test_two_processes_compile_with_one_cache(tmp_path: Path) -> None:
    script = """
import torch, normfused
torch.manual_seed(0)
model = torch.nn.Sequential(normfused.BatchNormAct2d(6, "relu"), torch.nn.Softplus(), normfused.GroupNorm(2, 6))
x = torch.randn(4, 6, 8, 8).requires_grad_()

def step(call):
    y = call(x)
    return y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])

for mine, expected in zip(step(torch.compile(model, fullgraph=True)), step(model), strict=True):
    torch.testing.assert_close(mine, expected)
print("true")
"""
    command = [sys.executable, "-c", script]
    variables = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    options: dict[str, Any] = {"cwd": tmp_path, "env": variables, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    assert [json.loads(process.communicate(timeout=500)[0] or "null") for process in processes] == [True, True]
    assert entries(tmp_path), "nothing was cached"
    done = subprocess.run(command, **options)
    assert json.loads(done.stdout or "null") is True
