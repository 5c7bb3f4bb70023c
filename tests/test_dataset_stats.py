"""dataset_stats and statistics over processes. Runs on the fallback too."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import BOOLS, CHW, HWC, IMAGES, OTHER_CHANNELS, assert_is_of_all_pixels, exact_sums
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from normfused import ChannelStats, dataset_stats
from normfused.data.dataset import collect


class Items(Dataset[Any]):
    """A map-style dataset, at module level so that a spawned process finds it."""

    def __init__(self, items: list[Any], fails_at: int | None = None, error: type[BaseException] = OSError) -> None:
        self.items, self.fails_at, self.error = items, fails_at, error

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise self.error("no such disk")
        return self.items[index]


class Threads(Items):
    """Raises if a worker process uses more than one thread."""

    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        assert torch.get_num_threads() == 1
        return self.items[index]


class Shard(IterableDataset[Any]):
    """Yields a different part of the items in each worker."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        return iter(self.items if worker is None else self.items[worker.id :: worker.num_workers])


class Everything(IterableDataset[Any]):
    """Yields all items in each worker."""

    def __iter__(self) -> Iterator[Any]:
        yield from IMAGES


class DividesWhileReading(IterableDataset[Any]):
    """A generator, which asks for its worker at the first item, and divides the items as it reads them."""

    def __iter__(self) -> Iterator[Any]:
        items = list(IMAGES)
        worker = torch.utils.data.get_worker_info()
        for index, item in enumerate(items):
            if worker is None or index % worker.num_workers == worker.id:
                yield item


def batches_of_one() -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1)[None] for image in IMAGES]


@pytest.mark.parametrize(
    "data",
    [
        lambda: IMAGES,
        lambda: tuple(IMAGES),
        lambda: iter(IMAGES),
        lambda: Items(IMAGES),
        lambda: Shard(IMAGES),
        lambda: Items([(image, 7) for image in IMAGES]),
        lambda: Items([{"label": 7, "image": image} for image in IMAGES]),
        lambda: Items([{"pixel_values": image} for image in IMAGES]),
        lambda: DataLoader(Items(batches_of_one()), batch_size=None),
        lambda: DataLoader(Items([(image, 7) for image in batches_of_one()]), batch_size=None),
    ],
    ids=["list", "tuple", "iterator", "dataset", "iterable", "pairs", "dicts", "pixels", "loader", "loader of pairs"],
)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_dataset_stats(data: Callable[[], Any], batch_size: int) -> None:
    assert_is_of_all_pixels(dataset_stats(data(), batch_size=batch_size))


def test_key_names_the_image() -> None:
    assert_is_of_all_pixels(dataset_stats(Items([{"scan": i, "image": 1} for i in IMAGES]), key="scan"))
    assert_is_of_all_pixels(dataset_stats(Items([(7, i) for i in IMAGES]), key=1))


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        (torch.from_numpy(np.stack([HWC, HWC[::-1], HWC])).permute(0, 3, 1, 2), None),
        (np.stack([HWC, HWC[::-1], HWC]), None),
        (np.stack([HWC, HWC[::-1], HWC]).transpose(0, 3, 1, 2), "NCHW"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_array_of_images(data: Any, layout: str | None, batch_size: int) -> None:
    stats = dataset_stats(data, layout=layout, batch_size=batch_size)
    assert stats.sums == tuple(s.merge(s).merge(s) for s in exact_sums(HWC.reshape(-1, 3)))
    assert stats.images == 3


def test_one_image_is_no_data_set() -> None:
    with pytest.raises(ValueError, match=r"images of shape \(60, 28, 28\) .* or 'NHW' for 60 grayscale images$"):
        dataset_stats(torch.zeros(60, 28, 28))
    message = r"^data of shape \(3, 28, 28\) has layout CHW, whose first dimension is not N: pass layout='NHW' for many"
    with pytest.raises(ValueError, match=message):
        dataset_stats(torch.zeros(3, 28, 28))
    assert dataset_stats(torch.zeros(60, 28, 28), layout="NHW").images == 60


@pytest.fixture
def start_method() -> Iterator[Callable[[str], None]]:
    """Sets the start method of processes, and restores it."""
    before = multiprocessing.get_start_method()
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("method", "workers"), [("fork", 4), pytest.param("spawn", 2, marks=pytest.mark.exhaustive)])
def test_workers(start_method: Callable[[str], None], method: str, workers: int) -> None:
    start_method(method)
    torch.ones(1 << 20).sum()  # starts the threads of this process
    assert_is_of_all_pixels(dataset_stats(Threads(IMAGES), num_workers=workers, batch_size=2))


@pytest.mark.parametrize("data", [Shard(IMAGES), Everything(), DividesWhileReading()])
@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_workers_of_an_iterable_dataset_count_each_image_once(data: IterableDataset[Any], workers: int) -> None:
    assert_is_of_all_pixels(dataset_stats(data, num_workers=workers))


def test_workers_give_bitwise_identical_results() -> None:
    floats = Items([torch.randn(3, 5 + i, 9) for i in range(10)])
    assert dataset_stats(floats, num_workers=2, batch_size=3) == dataset_stats(floats, batch_size=3)


def test_random_state_is_unchanged() -> None:
    state = torch.get_rng_state()
    dataset_stats(Items(IMAGES))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (lambda: Items(IMAGES, fails_at=5), RuntimeError, "item 5: OSError('no such disk')"),
        (lambda: Items(IMAGES, fails_at=5, error=ValueError), ValueError, "item 5: no such disk"),
        (lambda: Items([HWC, HWC > 3]), TypeError, f"item 1: {BOOLS}bool"),
        (lambda: Items([HWC, HWC, HWC[..., 0]]), ValueError, f"item 2: {OTHER_CHANNELS}"),
        (lambda: iter([HWC, HWC[..., 0]]), ValueError, f"item 1: {OTHER_CHANNELS}"),
        (
            lambda: Items([{"scan": HWC, "y": 3}]),
            ValueError,
            "item 0: a dict with the keys scan, y: pass key= to select the image",
        ),
        (lambda: [], ValueError, "data holds no images"),
        (lambda: Items([]), ValueError, "data holds no images"),
        (lambda: iter(()), ValueError, "data holds no images"),
        (lambda: torch.zeros(0, 3, 4, 4), ValueError, "data holds no images"),
    ],
)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_dataset_errors_name_the_item(
    data: Callable[[], Any], kind: type[Exception], message: str, batch_size: int
) -> None:
    with pytest.raises(kind) as error:
        dataset_stats(data(), batch_size=batch_size)
    assert str(error.value) == message


def test_error_keeps_its_cause() -> None:
    with pytest.raises(RuntimeError) as error:
        dataset_stats(Items(IMAGES, fails_at=0))
    assert isinstance(error.value.__cause__, OSError)


def test_error_in_a_worker_names_the_item() -> None:
    with pytest.raises(ValueError, match=r"item 3: no such disk"):
        dataset_stats(Items(IMAGES, fails_at=3, error=ValueError), num_workers=1, batch_size=2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        dataset_stats(IMAGES, batch_size=0)
    with pytest.raises(ValueError, match=r"^num_workers=2 needs a dataset or a sequence, got generator$"):
        dataset_stats((i for i in IMAGES), num_workers=2)
    with pytest.raises(ValueError, match=r"^num_workers=2 needs a dataset or a sequence, got DataLoader$"):
        dataset_stats(DataLoader(Items(IMAGES)), num_workers=2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_interrupted(batch_size: int) -> None:
    done = 5 // batch_size * batch_size
    data = Items(IMAGES, fails_at=5, error=KeyboardInterrupt)
    message = f"^interrupted: the statistics cover {done} of {len(IMAGES)} images$"
    with pytest.warns(RuntimeWarning, match=message):
        stats = dataset_stats(data, batch_size=batch_size)
    assert not stats.complete
    assert stats.images == done
    assert stats.sums == dataset_stats(IMAGES[:done]).sums
    assert not ChannelStats().merge(stats).complete


def test_interrupted_generator() -> None:
    def images() -> Iterator[np.ndarray]:
        yield from IMAGES[:3]
        raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="^interrupted: the statistics cover 3 images$"):
        assert dataset_stats(images()).images == 3


def test_interrupted_before_the_first() -> None:
    with pytest.warns(RuntimeWarning, match="cover 0 of 9 images"):
        stats = dataset_stats(Items(IMAGES, fails_at=0, error=KeyboardInterrupt))
    assert (stats.images, stats.complete) == (0, False)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_stats(IMAGES, batch_size=4)
    assert capsys.readouterr().err == ""  # no terminal
    dataset_stats(IMAGES, batch_size=4, progress=True)
    assert "9/9" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_is_of_all_pixels(dataset_stats(IMAGES, progress=True))


def test_collect_names_the_part() -> None:
    parts = [("first.png", ChannelStats().update(CHW)), ("second.png", ChannelStats().update(CHW[:1]))]
    with pytest.raises(ValueError, match=f"^second.png: {OTHER_CHANNELS}$"):
        collect(parts, ChannelStats(), None, False)


def test_dataset_stats_warns_once() -> None:
    x = torch.zeros(300, 1, 2, 2)
    x[::2, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning) as warned:
        stats = dataset_stats(TensorDataset(x))
    assert stats.nonfinite.tolist() == [150]
    assert len([w for w in warned if "NaN" in str(w.message)]) == 1


# --- several processes -------------------------------------------------------------------------

ALL_REDUCE = """
import sys
import numpy as np, torch
from torch import distributed
from normfused import ChannelStats

rank, store, state = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
stats = ChannelStats()
for seed in range(rank, 5, 2):  # 3 images here, 2 there
    torch.manual_seed(seed)
    stats.update(torch.randint(0, 256, (3, 4 + seed, 5), dtype=torch.uint8))
    stats.update(torch.randn(3, 4, 4))
assert stats.all_reduce() is stats
stats.save(f"{state}{rank}")
torch.manual_seed(0)
try:
    ChannelStats().update(torch.randn(1 + rank, 4, 4)).all_reduce()
except ValueError as error:
    assert str(error) == "channels: got 2, but the images before have 1", error
else:
    raise AssertionError("channels that do not fit")
distributed.destroy_process_group()
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_all_reduce(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store"), str(tmp_path / "stats")]
    command = [sys.executable, "-W", "ignore", "-c", ALL_REDUCE]
    # Not in the checkout: its normfused/ may have no extension.
    processes = [subprocess.Popen([*command, str(rank), *arguments], cwd=tmp_path) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (ChannelStats.load(f"{tmp_path}/stats{rank}") for rank in (0, 1))
    assert first == second
    alone = ChannelStats()
    for seed in (0, 2, 4, 1, 3):
        torch.manual_seed(seed)
        alone.update(torch.randint(0, 256, (3, 4 + seed, 5), dtype=torch.uint8))
        alone.update(torch.randn(3, 4, 4))
    assert first.sums == alone.sums
    assert first.images == 10
    torch.testing.assert_close(first.std, alone.std, rtol=1e-13, atol=0)


def test_all_reduce_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"^all_reduce needs a process group: call torch.distributed.init_process_"):
        ChannelStats().all_reduce()


# --- a billion values --------------------------------------------------------------------------

BILLION = """
import resource
import numpy as np, torch
from normfused import ChannelStats, dataset_stats

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

rows = torch.randint(0, 256, (1000, 1000, 1000), dtype=torch.uint8)
ChannelStats().update(rows[:1, :64], layout="NHW")  # threads and their stacks
x = rows.view(1000, 500, 1000, 2)
for images, layout in ((rows, "NHW"), (x, "NHWC"), (x.view(1000, 2, 500, 1000), "NCHW"), (x.numpy(), None)):
    for whole in (True, False):
        before = peak()
        stats = ChannelStats().update(images, layout) if whole else dataset_stats(images, layout=layout)
        grown = peak() - before
        assert grown < rows.numel() / 100, (layout, whole, grown)
        assert stats.count.sum() == 10**9
        assert sum(s.sum for s in stats.sums) == (total := int(rows.numpy().sum(dtype=np.int64)))
        if layout == "NHWC":
            assert [s.sum for s in stats.sums] == [int(x.numpy()[..., c].sum(dtype=np.int64)) for c in (0, 1)]
squares = sum(int((part.astype(np.int64) ** 2).sum()) for part in rows.numpy())
assert sum(s.sum_of_squares for s in stats.sums) == squares
"""


@pytest.mark.large
@pytest.mark.usefixtures("needs_extension")
def test_a_billion_bytes_need_no_additional_memory(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BILLION], check=True, timeout=900, cwd=tmp_path)


def test_batches_of_grayscale_images_need_a_layout() -> None:
    """Four images of shape (28, 28) would otherwise be four channels of one image."""
    images = torch.randint(0, 256, (10, 28, 28), dtype=torch.uint8)
    loader = DataLoader(images, batch_size=4)
    message = (
        r"item 0: a batch of shape \(4, 28, 28\): pass layout=, 'NHW' for grayscale images, or the layout of a single"
    )
    with pytest.raises(ValueError, match=message):
        dataset_stats(loader)
    stats = dataset_stats(loader, layout="NHW")
    assert (stats.images, stats.channels) == (10, 1)
    assert stats == ChannelStats().update(images, "NHW")


class Chunked:
    """As an array of zarr or h5py: it is neither a tensor nor a NumPy array, and reads what is indexed."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(self.array[index])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_arrays_of_other_libraries(num_workers: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
    expected = ChannelStats().update(array)
    assert dataset_stats(Chunked(array), num_workers=num_workers) == expected
    assert dataset_stats(Chunked(array.transpose(0, 3, 1, 2)), layout="NCHW", num_workers=num_workers) == expected


def test_a_dict_of_data_sets_is_refused() -> None:
    with pytest.raises(TypeError, match="data must be one dataset, got a dict of 'train', 'test': pass one of them"):
        dataset_stats({"train": [], "test": []})


@pytest.mark.parametrize(("data", "kind"), [(5, "int"), (None, "NoneType")])
def test_what_holds_no_items_is_refused(data: object, kind: str) -> None:
    message = f"data must be a path, tensor, array, dataset, loader or iterable, got {kind}"
    with pytest.raises(TypeError, match=message):
        dataset_stats(data)


def test_a_path_is_read_as_by_the_command(tmp_path: Path, workers: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    np.savez(tmp_path / "images.npz", x=pictures, y=np.arange(6))
    expected = ChannelStats().update(pictures)
    with pytest.warns(RuntimeWarning, match=r"not read: not a picture by its name: .*images\.npz"):
        assert dataset_stats(tmp_path, num_workers=workers) == expected
    assert dataset_stats(str(tmp_path / "images.npz"), key="x") == expected
    assert dataset_stats(str(tmp_path / "images.npz"), key="x", layout="NHWC", scale=0.5).scale == 0.5
    (tmp_path / "7.png").write_bytes(b"no PNG")
    with pytest.raises(ValueError, match=r"7\.png: cannot identify image file"):
        dataset_stats(tmp_path, num_workers=workers)
    with pytest.raises(FileNotFoundError):
        dataset_stats(tmp_path / "missing")
