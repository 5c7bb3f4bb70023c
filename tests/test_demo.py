"""The demo: its data, its networks, and short training runs."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfused
from normfused.cli import demo
from normfused.cli.demo import cifar, data, experiments
from normfused.cli.demo.dataset import Dataset, Split, Standardization
from normfused.cli.demo.errors import DemoError
from normfused.cli.demo.report import Comparison, compare
from normfused.cli.demo.training import Curve, Epoch, Examples, Training, accuracy
from normfused.cli.main import main
from normfused.data.files import read_idx
from normfused.errors import CommandError

IMAGES = torch.arange(20 * 6 * 5).remainder(251).to(torch.uint8).view(20, 6, 5)
LABELS = torch.arange(20).remainder(10).to(torch.uint8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that more threads make them slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides all data sets except scikit-learn's digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "missing")


# --- IDX ---------------------------------------------------------------------------------------


def idx_bytes(values: Tensor) -> bytes:
    sizes = struct.pack(f">{values.dim()}I", *values.shape)
    return bytes((0, 0, 8, values.dim())) + sizes + values.numpy().tobytes()


def write_idx_folder(
    folder: Path, compress: Callable[[bytes], bytes] | None = None, splits: str = "train t10k"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in splits.split():
        for name, values in (("images-idx3-ubyte", IMAGES), ("labels-idx1-ubyte", LABELS)):
            content = idx_bytes(values)
            path = folder / f"{prefix}-{name}"
            if compress:
                path.with_name(f"{path.name}.gz").write_bytes(compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("compress", [None, gzip.compress])
@pytest.mark.parametrize("folder", [Path(), Path("FashionMNIST/raw")])
def test_idx_folder_is_read(tmp_path: Path, folder: Path, compress: Callable[[bytes], bytes] | None) -> None:
    write_idx_folder(tmp_path / folder, compress)
    dataset = data.find_dataset(tmp_path)
    assert dataset.source == str(tmp_path / folder)
    assert dataset.test is not None
    for split in (dataset.train, dataset.test):
        assert torch.equal(split.images, IMAGES.unsqueeze(1))
        assert torch.equal(split.labels, LABELS.long())


def test_idx_folder_without_test_split(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, splits="train")
    assert data.find_dataset(tmp_path).test is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes in 3D: starts with nothing, not 00 00 08 03"),
        (
            b"\x89PNG\r\n",
            "not an IDX file of unsigned bytes in 3D: starts with 89 50 4e 47, not 00 00 08 03",
        ),
        (
            b"\0\0\x0d\x03" + bytes(12),
            "not an IDX file of unsigned bytes in 3D: starts with 00 00 0d 03, not 00 00 08 03",
        ),
        (
            idx_bytes(LABELS),
            "not an IDX file of unsigned bytes in 3D: starts with 00 00 08 01, not 00 00 08 03",
        ),
        (idx_bytes(IMAGES)[:9], "ends in its header, after 9 of 16 bytes"),
        (idx_bytes(IMAGES)[:-1], "sizes (20, 6, 5) need 600 bytes, the file has 599"),
        (idx_bytes(IMAGES) + b"\0", "sizes (20, 6, 5) need 600 bytes, the file has 601"),
        (idx_bytes(IMAGES[:0]), "sizes (0, 6, 5) need 0 bytes, the file has 0"),
    ],
)
def test_malformed_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(CommandError) as raised:
        read_idx(path, 3)
    assert str(raised.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],
        lambda content: b"plain" + content,
        lambda content: content[:30] + bytes(40) + content[70:],
    ],
    ids=["truncated", "not gzip", "overwritten"],
)
def test_damaged_gzip_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(IMAGES), mtime=0)))
    with pytest.raises(CommandError) as raised:
        read_idx(path, 3)
    assert str(raised.value).startswith(f"{path}: damaged gzip file: ")


def test_missing_label_file_is_named(tmp_path: Path) -> None:
    write_idx_folder(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.unlink()
    with pytest.raises(DemoError) as raised:
        data.find_dataset(tmp_path)
    assert str(raised.value) == f"{labels}: no such file, neither plain nor with .gz"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS[:19], "19 labels for 20 images"),
        (IMAGES, LABELS + 1, "labels are 1 to 10, not 0 to 9"),
        (IMAGES[:, :3], LABELS, "images of 3x5 pixels, but the networks need at least 4x4"),
    ],
)
def test_invalid_data_are_named(tmp_path: Path, images: Tensor, labels: Tensor, message: str) -> None:
    path = tmp_path / "labels"
    with pytest.raises(DemoError) as raised:
        Split.checked(images.unsqueeze(1), labels, path)
    assert str(raised.value) == f"{path}: {message}"


# --- CIFAR-10 ----------------------------------------------------------------------------------

CIFAR_PIXELS = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)
CIFAR_LABELS = [3, 0, 9, 5]
CIFAR_BATCH = {b"data": CIFAR_PIXELS, b"labels": CIFAR_LABELS, b"batch_label": b"batch 1 of 5"}


def write_cifar_python(folder: Path) -> None:
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(CIFAR_BATCH))


def write_cifar_binary(folder: Path) -> None:
    content = b"".join(
        bytes([label]) + pixels.tobytes() for label, pixels in zip(CIFAR_LABELS, CIFAR_PIXELS, strict=True)
    )
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / f"{name}.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("write", "unpacked"),
    [(write_cifar_python, "cifar-10-batches-py"), (write_cifar_binary, "cifar-10-batches-bin")],
)
@pytest.mark.parametrize("root_is_parent", [False, True])
def test_cifar_folder_is_read(
    tmp_path: Path, write: Callable[[Path], None], unpacked: str, root_is_parent: bool
) -> None:
    folder = tmp_path / unpacked
    folder.mkdir()
    write(folder)
    dataset = data.find_dataset(tmp_path if root_is_parent else folder)
    images = torch.from_numpy(CIFAR_PIXELS).view(4, 3, 32, 32)
    assert dataset.name == "CIFAR-10"
    assert torch.equal(dataset.train.images, images.repeat(5, 1, 1, 1))
    assert dataset.train.labels.tolist() == CIFAR_LABELS * 5
    assert dataset.test is not None
    assert torch.equal(dataset.test.images, images)
    assert dataset.test.labels.tolist() == CIFAR_LABELS


def test_pickle_written_by_python_2(tmp_path: Path) -> None:
    # As in the published files: protocol 2, native strings, and the module name of numpy 1.
    path = tmp_path / "batch"
    path.write_bytes(
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x02\x07\x08tbs."
    )
    loaded = cifar.load_arrays(path)
    assert list(loaded) == [b"data"]
    assert loaded[b"data"].tolist() == [7, 8]


class Exploit:
    """Calls a function when an ordinary unpickler loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickle_that_calls_a_function_is_refused(tmp_path: Path) -> None:
    path, touched = tmp_path / "data_batch_1", tmp_path / "touched"
    path.write_bytes(pickle.dumps({b"data": Exploit(touched), b"labels": []}))
    with pytest.raises(DemoError) as raised:
        cifar.load_arrays(path)
    assert str(raised.value).startswith(f"{path}: refused to load ")
    assert not touched.exists()
    pickle.loads(path.read_bytes())
    assert touched.exists(), "an ordinary unpickler must call the function"


@pytest.mark.parametrize("name", ["eval", "getattr", "dict", "bytearray"])
def test_even_builtins_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(DemoError) as raised:
        cifar.load_arrays(path)
    expected = f"refused to load builtins.{name}: only arrays and plain containers are read"
    assert str(raised.value) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"labels": [1]}, "KeyError(b'data')"),
        ([CIFAR_PIXELS], "TypeError("),
        ({**CIFAR_BATCH, b"labels": ["one"]}, "ValueError("),
        ({**CIFAR_BATCH, b"data": CIFAR_PIXELS[:, :-1]}, "RuntimeError("),
        (
            {**CIFAR_BATCH, b"data": CIFAR_PIXELS.astype(np.float32)},
            "data of torch.float32, labels of torch.int64",
        ),
        ({**CIFAR_BATCH, b"labels": [0.5] * 4}, "data of torch.uint8, labels of torch.float32"),
    ],
)
def test_pickle_of_something_else_is_named(tmp_path: Path, batch: object, message: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(DemoError) as raised:
        cifar.read_pickle(path)
    assert str(raised.value).startswith(f"{path}: not a CIFAR-10 batch: {message}")


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(CIFAR_BATCH)[:-50]])
def test_damaged_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DemoError) as raised:
        cifar.read_pickle(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("size", [0, 3072])
def test_binary_batch_of_another_size_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(DemoError) as raised:
        cifar.read_records(path)
    expected = f"{size} bytes are not a multiple of the record size of 3073 bytes"
    assert str(raised.value) == f"{path}: {expected}"


# --- digits, and all data ----------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_installed")
def test_digits_are_used_if_nothing_is_installed(tmp_path: Path) -> None:
    dataset = data.find_dataset(None)
    assert dataset.train.images.shape == (1500, 1, 8, 8)
    assert dataset.test is not None
    assert dataset.test.images.shape == (297, 1, 8, 8)
    assert int(dataset.train.images.max()) == dataset.white == 16
    assert dataset.source == (
        f"scikit-learn, as Fashion-MNIST is neither in {tmp_path / 'missing'} "
        "(apt install dataset-fashion-mnist) nor in data/FashionMNIST/raw"
    )


@pytest.mark.usefixtures("nothing_installed")
def test_torchvision_root_in_data_is_found() -> None:
    write_idx_folder(Path("data/FashionMNIST/raw"))
    dataset = data.find_dataset(None)
    assert (dataset.name, len(dataset.train)) == ("Fashion-MNIST", 20)


def test_limit_keeps_only_the_first_training_images() -> None:
    split = Split(IMAGES.unsqueeze(1), LABELS.long())
    dataset = Dataset("name", "source", split, split)
    limited = dataset.limited(7)
    assert torch.equal(limited.train.images, IMAGES[:7].unsqueeze(1))
    assert limited.train.labels.tolist() == LABELS[:7].tolist()
    assert limited.test is split
    assert limited.source == "source, first 7 of 20 training images"
    assert dataset.limited(None) is dataset.limited(20) is dataset


def test_standardized_pixels_have_mean_0_and_std_1() -> None:
    images = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8)
    dataset = Dataset("name", "source", Split(images, LABELS.long()), None)
    pixels = Standardization.of(dataset).apply(images, 255)
    assert pixels.dtype == torch.float32
    std, mean = torch.std_mean(pixels.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-7, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-7, rtol=0)


def test_constant_channel_cannot_be_standardized() -> None:
    images = torch.full((20, 1, 8, 8), 7, dtype=torch.uint8)
    dataset = Dataset("name", "folder", Split(images, LABELS.long()), None)
    with pytest.raises(DemoError, match=r"^folder: all pixels of a channel have the same value$"):
        Standardization.of(dataset)


# --- networks ----------------------------------------------------------------------------------


def parameter_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters()]


CNN_SHAPES = [(6, 1, 5, 5), (6,), (12, 6, 5, 5), (12,), (120, 192), (120,)]
CNN_HEAD_SHAPES = [(60, 120), (60,), (10, 60), (10,)]


def test_parameter_shapes_of_the_cnn() -> None:
    plain = experiments.cnn(torch.Size((1, 28, 28)), None)
    assert parameter_shapes(plain) == CNN_SHAPES + CNN_HEAD_SHAPES
    normed = experiments.cnn(torch.Size((1, 28, 28)), normfused)
    expected = [*CNN_SHAPES[:2], (6,), (6,), *CNN_SHAPES[2:], (120,), (120,), *CNN_HEAD_SHAPES]
    assert parameter_shapes(normed) == expected


def test_mlp_has_batch_norm_before_each_relu() -> None:
    network = experiments.mlp(torch.Size((3, 32, 32)), normfused)
    names = [type(layer).__name__ for layer in network]
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert names == ["Flatten", *block, *block, "Linear"]
    assert parameter_shapes(network)[0] == (64, 3072)


@pytest.mark.parametrize("build", [experiments.cnn, experiments.mlp])
@pytest.mark.parametrize("layers", [None, normfused, nn])
@pytest.mark.parametrize("image", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (1, 16, 19), (2, 4, 15)])
def test_networks_fit_every_image(
    build: Callable[..., nn.Module],
    layers: experiments.NormLayers | None,
    image: tuple[int, ...],
) -> None:
    network = build(torch.Size(image), layers)
    assert network(torch.zeros(2, *image)).shape == (2, 10)


@pytest.mark.parametrize("build", [experiments.cnn, experiments.mlp])
def test_a_seed_gives_equal_initial_weights(build: Callable[..., nn.Module]) -> None:
    def weights(layers: experiments.NormLayers | None) -> list[Tensor]:
        torch.manual_seed(50)
        network = build(torch.Size((1, 28, 28)), layers)
        weighted = [layer for layer in network.children() if isinstance(layer, nn.Linear | nn.Conv2d)]
        return [parameter for layer in weighted for parameter in layer.parameters()]

    for plain, ours, theirs in zip(weights(None), weights(normfused), weights(nn), strict=True):
        assert torch.equal(plain, ours)
        assert torch.equal(plain, theirs)


@pytest.mark.parametrize("build", [experiments.cnn, experiments.mlp])
def test_networks_of_both_batch_norms_have_equal_gradients(build: Callable[..., nn.Module]) -> None:
    def loss_and_gradients(layers: experiments.NormLayers) -> list[Tensor]:
        torch.manual_seed(50)
        network = build(torch.Size((1, 28, 28)), layers).double()
        inputs = torch.randn(20, 1, 28, 28, dtype=torch.float64)
        loss = nn.functional.cross_entropy(network(inputs), LABELS.long())
        return [loss, *torch.autograd.grad(loss, list(network.parameters()))]

    torch.testing.assert_close(loss_and_gradients(normfused), loss_and_gradients(nn), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "images", "size"),
    [("cnn", 60_000, 1000), ("cnn", 1500, 100), ("cnn", 30, 2), ("mlp", 60_000, 10)],
)
def test_batch_size(name: str, images: int, size: int) -> None:
    assert experiments.EXPERIMENTS[name].batch_size(images) == size


# --- training and report -----------------------------------------------------------------------


class RightInEvalMode(nn.Module):
    """Predicts class 1 in eval mode and class 0 in training mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(inputs),), int(not self.training)), 10)


def test_accuracy_is_measured_in_eval_mode() -> None:
    labels = torch.ones(2500, dtype=torch.int64)
    labels[2000:] = 2
    assert accuracy(RightInEvalMode(), Examples(torch.zeros(2500, 1), labels)) == 0.8


def test_comparison_uses_largest_difference_and_best_epochs() -> None:
    ours = Curve(experiments.OURS, [Epoch(0.5, 1.0, 9.0), Epoch(0.75, 0.5, 2.0)], None, 100)
    theirs = Curve(experiments.THEIRS, [Epoch(0.25, 1.0, 3.0), Epoch(0.75, 0.5, 4.0)], None, 125)
    assert compare([ours, theirs]) == Comparison(largest_difference=0.25, time_ratio=1.5, saved_ratio=1.25)
    assert compare([ours]) is None


# --- complete runs -----------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.usefixtures("nothing_installed")
def test_demo_trains_and_both_batch_norms_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert main(["demo", "--epochs", "3", "--seed", "7", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    curves = {curve["run"]: [epoch["accuracy"] for epoch in curve["epochs"]] for curve in results["runs"]}
    assert list(curves) == ["batch norm", "no batch norm", "raw inputs", "batch norm (torch.nn)"]
    # Training amplifies rounding errors. After these 45 steps, two runs of torch.nn whose weights differ
    # by one rounding differ by up to 0.009, normfused and torch.nn by up to 0.02 (six seeds each).
    # test_networks_of_both_batch_norms_have_equal_gradients has the exact comparison.
    assert curves["batch norm"] == pytest.approx(curves["batch norm (torch.nn)"], abs=0.03)
    # Without batch norm the first epoch differs, so the comparison above can fail.
    assert curves["batch norm"][0] > curves["no batch norm"][0] + 0.1
    assert curves["raw inputs"][0] != curves["no batch norm"][0]
    assert results["comparison"]["largest_difference"] <= 0.03
    assert results["settings"]["seed"] == 7
    assert results["settings"]["batch_size"] == 100
    assert results["data"]["training_images"] == 1500
    assert all(len(curve) == 3 for curve in curves.values())
    assert all(curve["test_accuracy"] > 0.5 for curve in results["runs"][:2])

    assert (out / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "results.json"]
    printed = capsys.readouterr().out
    for curve in results["runs"]:
        accuracy = f"{curve['epochs'][-1]['accuracy']:.4f}"
        assert any(line.startswith(f"{curve['run']} ") and accuracy in line for line in printed.splitlines())


@pytest.mark.exhaustive
@pytest.mark.usefixtures("nothing_installed")
def test_resnet_is_converted_and_trains_alike(tmp_path: Path) -> None:
    arguments = ["--experiment", "resnet", "--epochs", "2", "--limit", "400", "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    runs = {run["run"]: run for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    assert list(runs) == ["batch norm", "batch norm, in place", "batch norm (torch.nn)"]
    first = [run["epochs"][0]["loss"] for run in runs.values()]
    assert first == pytest.approx([first[-1]] * 3, rel=0.01)
    saved = [run["saved_bytes"] for run in runs.values()]
    if normfused.info()["extension"] == "loaded":
        assert saved[1] < 0.8 * saved[2]
        assert saved[0] < 1.01 * saved[2]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("nothing_installed")
def test_group_norm_is_converted_and_trains_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--experiment", "groupnorm", "--epochs", "2", "--limit", "400", "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    ours, theirs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (ours["run"], theirs["run"]) == ("group norm", "group norm (torch.nn)")
    assert ours["epochs"][0]["loss"] == pytest.approx(theirs["epochs"][0]["loss"], rel=0.01)
    assert "group norm, normfused and torch.nn: training accuracies differ" in capsys.readouterr().out
    if normfused.info()["extension"] == "loaded":
        assert ours["saved_bytes"] < 1.01 * theirs["saved_bytes"]


@pytest.mark.usefixtures("nothing_installed")
def test_only_the_same_seed_and_order_reproduce_results(tmp_path: Path) -> None:
    def losses(seed: int, *options: str) -> list[float]:
        arguments = ["--experiment", "mlp", "--epochs", "1", "--limit", "300", *options]
        assert main(["demo", *arguments, "--seed", str(seed), "--out", str(tmp_path)]) == 0
        runs = json.loads((tmp_path / "results.json").read_text())["runs"]
        return [run["epochs"][0]["loss"] for run in runs]

    shuffled = losses(1, "--shuffle")
    assert losses(1, "--shuffle") == pytest.approx(shuffled, rel=1e-5)
    assert losses(1) != pytest.approx(shuffled, rel=1e-5)
    assert losses(2, "--shuffle") != pytest.approx(shuffled, rel=1e-3)


@pytest.mark.usefixtures("nothing_installed")
def test_ctrl_c_keeps_the_completed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = demo.train

    def train_until_interrupted(run: experiments.Run, training: Training) -> Curve:
        if run.name == "raw inputs":
            raise KeyboardInterrupt
        return train(run, training)

    monkeypatch.setattr(demo, "train", train_until_interrupted)
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path)]) == 130
    message = f"\ninterrupted: 2 of 4 runs are complete and saved in {tmp_path}\n"
    assert capsys.readouterr().err == message
    results = json.loads((tmp_path / "results.json").read_text())
    assert [curve["run"] for curve in results["runs"]] == ["batch norm", "no batch norm"]
    assert results["comparison"] is None
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.usefixtures("nothing_installed")
def test_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--limit", "29", "--out", str(tmp_path)]) == 2
    message = "29 training images are too few: at least 30 are needed"
    assert capsys.readouterr().err == f"normfused demo: error: {message}\n"


@pytest.mark.usefixtures("nothing_installed")
def test_failed_write_leaves_no_partial_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").mkdir()
    assert main(["demo", "--epochs", "1", "--limit", "30", "--out", str(tmp_path)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("normfused demo: error: ")
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
