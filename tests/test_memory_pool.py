"""Outputs in the memory pool are tensors like any other, and the pool gives way when memory is short."""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scripts import python, value

import normfused
import normfused.functional as F

pytestmark = pytest.mark.usefixtures("needs_pool")

MIB = 2**20
SHAPE = (16, 64, 32, 32)  # float32: 4 MiB


@pytest.fixture
def needs_pool(needs_extension: None) -> Iterator[None]:
    if os.environ.get("NORMFUSED_POOL") == "0" or sys.platform != "linux":
        pytest.skip("no pool")
    gc.collect()
    normfused.empty_cache()
    yield
    normfused.empty_cache()


def output(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return normfused.BatchNorm2d(shape[1])(torch.randn(shape)).detach()


def in_use() -> int:
    return normfused.memory_stats()["allocated_bytes"]


def test_a_freed_output_is_reused() -> None:
    before = normfused.memory_stats()
    y = output()
    address = y.data_ptr()
    assert in_use() == before["allocated_bytes"] + 4 * MIB
    del y
    assert normfused.memory_stats()["cached_bytes"] >= 4 * MIB
    again = output()
    assert again.data_ptr() == address
    assert normfused.memory_stats()["reuses"] > before["reuses"]


def outputs(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Everything that a large output comes from."""
    channels = x.shape[1]
    block = normfused.BatchNormAct2d(channels, "relu")
    image = torch.randint(256, (8, 3, 256, 256), dtype=torch.uint8)

    def gradients() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        y = block(*inputs)
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    return {
        "forward": lambda: normfused.BatchNorm2d(channels)(x),
        "evaluation": lambda: normfused.BatchNorm2d(channels).eval()(x),
        "gradients": gradients,
        "channels last": lambda: normfused.BatchNorm2d(channels)(x.contiguous(memory_format=torch.channels_last)),
        "images": lambda: normfused.normalize(image, [0.5] * 3, [0.5] * 3),
        "local response norm": lambda: F.local_response_norm(x, 5),
    }


@pytest.mark.parametrize("kind", list(outputs(torch.empty(1, 1, 1, 1))))
def test_every_kind_of_output_uses_the_pool(kind: str) -> None:
    before, allocations = in_use(), normfused.memory_stats()["allocations"]
    result = outputs(torch.randn(SHAPE))[kind]()
    made = result if isinstance(result, list) else [result]
    assert normfused.memory_stats()["allocations"] >= allocations + len(made)
    assert in_use() >= before + sum(t.nbytes for t in made)
    del result, made
    gc.collect()
    assert in_use() == before


def test_the_sign_mask_uses_the_pool() -> None:
    x = torch.randn(16, 64, 128, 128)  # 64 MiB, and 2 MiB of mask
    before = in_use()
    y = normfused.BatchNormAct2d(64, "relu")(x.requires_grad_(), x.detach())
    assert in_use() - before >= (64 + 2) * MIB
    assert y.grad_fn is not None


def test_small_outputs_do_not_use_the_pool() -> None:
    allocations = normfused.memory_stats()["allocations"]
    output((2, 64, 32, 32))  # 512 KiB
    assert normfused.memory_stats()["allocations"] == allocations


@pytest.mark.exhaustive
def test_results_are_bitwise_the_same_without_the_pool() -> None:
    script = """
import hashlib, json, torch, normfused
torch.manual_seed(0)
x, r = torch.randn(16, 64, 48, 48), torch.randn(16, 64, 48, 48)
digests = []
for dtype in (torch.float32, torch.bfloat16):
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in (x, r))
        y = normfused.BatchNormAct2d(64, "relu")(a, b)
        grads = torch.autograd.grad(y, [a, b], torch.ones_like(y) * 0.1)
        for t in (y, *grads):
            digests.append(hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest())
print(json.dumps([digests, normfused.memory_stats()["allocations"]]))
"""
    with_pool, allocations = value(script)  # type: ignore[misc]
    without_pool, none = value(script, NORMFUSED_POOL="0")  # type: ignore[misc]
    assert with_pool == without_pool
    assert allocations >= 12
    assert none == 0


def test_resize_in_place() -> None:
    y = output()
    expected = y.flatten()[:1000].clone()
    before = in_use()
    y.resize_(32, 64, 32, 32)  # larger: moved within the pool
    assert torch.equal(y.flatten()[:1000], expected)
    assert in_use() >= before + 4 * MIB
    y.untyped_storage().resize_(64)  # to memory of malloc
    assert in_use() <= before - 4 * MIB
    y.untyped_storage().resize_(0)
    assert y.untyped_storage().nbytes() == 0


def test_set_and_views_keep_the_memory() -> None:
    y = output()
    before = in_use()
    expected = y[3, 5].clone()
    view, other = y[3, 5], torch.empty(0).set_(y)
    del y
    assert in_use() == before
    assert torch.equal(view, expected)
    del view
    assert torch.equal(other[3, 5], expected)
    del other
    assert in_use() == before - 4 * MIB


def test_a_numpy_view_outlives_the_tensor() -> None:
    y = output()
    expected = y.clone().numpy()
    before = in_use()
    array = y.numpy()
    del y
    assert in_use() == before
    for _ in range(3):
        output()
    assert (array == expected).all()
    del array
    assert in_use() == before - 4 * MIB


def test_share_memory_moves_the_data() -> None:
    y = output()
    expected, before = y.clone(), in_use()
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, expected)
    assert in_use() == before - 4 * MIB


def test_pickle_save_and_dlpack(tmp_path: Path) -> None:
    y = output()
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt"), y)
    expected, capsule = y.clone(), torch.utils.dlpack.to_dlpack(y)
    del y
    output()
    assert torch.equal(torch.utils.dlpack.from_dlpack(capsule), expected)


def test_freed_in_another_thread() -> None:
    before, holder = in_use(), [output(), output()]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert in_use() == before


def test_eight_threads_train() -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    reference = torch.autograd.grad(normfused.BatchNorm2d(64)(z := x.clone().requires_grad_()).square().sum(), z)[0]
    errors: list[str] = []

    def train(index: int) -> None:
        for step in range(6):
            z = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(normfused.BatchNorm2d(64)(z).square().sum(), z)
            if not torch.equal(gradient, reference):
                errors.append(f"thread {index}, step {step}")

    threads = [threading.Thread(target=train, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_memory_profiling_counts_the_outputs() -> None:
    x = torch.randn(SHAPE)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = normfused.BatchNorm2d(64)(x)
    allocated = sum(
        event.self_cpu_memory_usage for event in profile.key_averages() if event.key.startswith("normfused")
    )
    assert allocated >= y.nbytes


@pytest.mark.exhaustive
def test_a_forked_child_uses_the_pool() -> None:
    script = """
import os, threading, torch, normfused
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
x = torch.randn(16, 64, 32, 32)
bn = normfused.BatchNorm2d(64).eval()
expected, stop = bn(x), threading.Event()

def work():
    while not stop.is_set():
        bn(x)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        same = all(torch.equal(bn(x), expected) for _ in range(5))
        os._exit(0 if same else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for thread in threads:
    thread.join()
print(codes)
"""
    assert value(script) == [0] * 20


@pytest.mark.exhaustive
def test_outputs_may_outlive_the_interpreter() -> None:
    script = """
import atexit, sys, torch, normfused
y = normfused.BatchNorm2d(64)(torch.randn(16, 64, 32, 32))
sys.modules["kept"] = y                       # freed while modules are torn down
torch._kept = y.grad_fn                       # an autograd graph too
atexit.register(lambda: normfused.BatchNorm2d(64)(torch.randn(16, 64, 32, 32)))
print(0)
"""
    assert value(script) == 0


@pytest.mark.exhaustive
def test_an_address_space_limit_is_respected() -> None:
    """Free memory does not count as free there, so the pool keeps none, and leaves the addresses to others."""
    script = """
import json, resource, torch, normfused
bn, x = normfused.BatchNorm2d(64).eval(), torch.randn(64, 64, 64, 64)  # 64 MiB
bn(x)
kept = normfused.memory_stats()["cached_bytes"]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, -1))
for _ in range(20):
    y = bn(x)
    del y
    other = torch.empty(100 * 2**20, dtype=torch.uint8).fill_(1)  # fits only beside nothing
    del other
try:
    bn(x[:, :, :1, :1].expand(64, 64, 512, 512))  # 4 GiB
except RuntimeError as error:
    message = str(error)
print(json.dumps([kept, normfused.memory_stats()["cached_bytes"], message]))
"""
    kept, cached, message = value(script)  # type: ignore[misc]
    assert kept == 64 * MIB
    assert cached == 0
    assert "can't allocate memory" in message  # torch's error


def control_group(limit: int) -> Path:
    """A new control group of this process's with a memory limit, which a test removes again."""
    for root, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        group = root / f"normfused-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / name).exists():
            (group / name).write_text(str(limit))
            return group
        group.rmdir()  # not a file system of control groups, or not one of memory
    pytest.skip("no control group with a memory limit can be made here")


@pytest.mark.exhaustive
def test_free_memory_gives_way_in_a_control_group() -> None:
    """700 MiB in use, 300 MiB free, and torch, in a group of 1 GiB: the system takes the pages of the free part."""
    group = control_group(1024 * MIB)
    script = f"""
import json, os
with open({str(group / "cgroup.procs")!r}, "w") as file:
    file.write(str(os.getpid()))
import torch, normfused
bn = normfused.BatchNorm2d(64).eval()
x = torch.randn(100, 64, 64, 64)  # 100 MiB
outputs = [bn(x) for _ in range(4)]
del outputs
cached = normfused.memory_stats()["cached_bytes"]
other = torch.empty(500 * 2**20, dtype=torch.uint8).fill_(1)  # by malloc, which does not ask the pool
y = bn(x)
print(json.dumps([cached, int(other[::4096].sum()), bool(torch.allclose(y[::10], x[::10] / (1 + bn.eps) ** 0.5))]))
"""
    try:
        assert value(script) == [400 * MIB, 500 * 256, True]
    finally:
        group.rmdir()  # which the kernel empties of files


@pytest.mark.exhaustive
def test_limit_of_the_environment() -> None:
    script = """
import json, torch, normfused
bn, x = normfused.BatchNorm2d(64).eval(), torch.randn(16, 64, 32, 32)
[bn(x) for _ in range(4)]
stats = normfused.memory_stats()
print(json.dumps([stats["cached_bytes"], stats["max_cached_bytes"]]))
"""
    assert value(script, NORMFUSED_POOL_LIMIT=str(6 * MIB)) == [6 * MIB, 6 * MIB]
    assert value(script, NORMFUSED_POOL_LIMIT="0") == [0, 0]


def test_wrong_settings_are_refused() -> None:
    size = "must be a number of bytes, got"
    messages = {
        ("NORMFUSED_POOL", "yes"): "NORMFUSED_POOL must be 0 or 1, got 'yes'",
        ("NORMFUSED_POOL_LIMIT", "1G"): f"NORMFUSED_POOL_LIMIT {size} '1G'",
        ("NORMFUSED_POOL_LIMIT", "-1"): f"NORMFUSED_POOL_LIMIT {size} '-1'",
        ("NORMFUSED_POOL_LIMIT", "99999999999999999999999"): f"NORMFUSED_POOL_LIMIT {size} '99999999999999999999999'",
    }
    # A process reads the settings once, so each is tried in a child.
    script = f"""
import json, os, torch, normfused
layer, x = normfused.BatchNorm2d(64), torch.zeros(16, 64, 32, 32)
for name, text in {list(messages)!r}:
    if os.fork() == 0:
        os.environ[name] = text
        try:
            layer(x)
            message = None
        except ValueError as error:
            message = str(error)
        print(json.dumps(message), flush=True)
        os._exit(0)
    os.wait()
"""
    done = python(script)
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(messages.values()), done.stderr


def test_empty_cache_keeps_what_is_alive() -> None:
    y = output()
    expected = y.clone()
    output()
    normfused.empty_cache()
    assert normfused.memory_stats()["cached_bytes"] == 0
    assert torch.equal(y, expected)
