"""``normfused stats``: inputs, printed and written results, exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stats_runs import GRAY, PICTURES, RANDOM, RGB, STACK, expected, fails_with, readers, run, signalled

import normfused
from normfused import ChannelStats
from normfused.cli.main import main
from normfused.cli.stats import histogram
from normfused.data import pictures
from normfused.data.pictures import Pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five RGB pictures, 0.png to 4.bmp, a text file, and an empty folder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i, (pixels, ending) in enumerate(zip(PICTURES, ("png", "PNG", "tiff", "webp", "bmp"), strict=True)):
        Image.fromarray(pixels).save(folder / f"{i}.{ending}", lossless=True)
    (folder / "labels.txt").write_text("cat")
    return folder


# What is printed about the folder's other files.
TEXT = "not read (not a picture by its name): labels.txt\n"
SUBFOLDER = "not read (subfolder, which --recursive searches): more\n"


# --- inputs ------------------------------------------------------------------------------------


def test_folder(folder: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, folder, "--workers", workers) == (0, f"{expected(PICTURES)}\n", TEXT + SUBFOLDER)


def test_one_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, folder / "0.png") == (0, f"{expected(PICTURES[:1])}\n", "")


def test_recursive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(PICTURES[0]).save(folder / "more" / "0.png")
    assert run(capsys, folder) == (0, f"{expected(PICTURES)}\n", TEXT + SUBFOLDER)
    assert run(capsys, folder, "--recursive") == (0, f"{expected([*PICTURES, PICTURES[0]])}\n", TEXT)


def test_links_to_folders_are_followed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(PICTURES[1]).save(elsewhere / "1.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "more" / "again").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    (folder / "more" / "self").symlink_to(folder / "more")
    (folder / "no folder").symlink_to("no folder")
    code, table, error = run(capsys, folder, "--recursive")
    assert (code, table) == (0, f"{expected([*PICTURES, PICTURES[1], PICTURES[1]])}\n")
    assert error == "not read (not a picture by its name): labels.txt, no folder\n"


def test_a_link_to_a_folder_of_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert run(capsys, tmp_path / "link")[:2] == (0, f"{expected(PICTURES)}\n")


def test_a_link_to_nothing_is_no_picture_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = folder / "5.png"
    link.symlink_to("gone.png")
    reason = f"[Errno 2] No such file or directory: '{link}'"
    assert fails_with(f"{link}: {reason}", capsys, folder)
    code, table, error = run(capsys, folder, "--on-error", "skip")
    assert (code, table) == (0, f"{expected(PICTURES)}\n")
    assert error == f"skipped {link}: {reason}\n1 of 6 files were skipped\n" + TEXT + SUBFOLDER


def test_a_folder_that_cannot_be_listed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because root may list every folder."""
    closed = folder / "more"
    reason = f"[Errno 13] Permission denied: '{closed}'"
    for name in ("scandir", "listdir"):
        real = getattr(os, name)

        def restricted(path: Any, real: Any = real) -> Any:
            if Path(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, name, restricted)
    assert fails_with(f"{closed}: {reason}", capsys, folder, "--recursive")
    code, table, error = run(capsys, folder, "--recursive", "--on-error", "skip")
    assert (code, table) == (0, f"{expected(PICTURES)}\n")
    assert error == f"skipped {closed}: {reason}\n1 of 6 files were skipped\n" + TEXT


def test_long_lists_are_shortened(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(9):
        (folder / f"{i}.csv").write_text("")
    out = tmp_path / "out.json"
    error = run(capsys, folder, "--json", out)[2]
    assert error.splitlines()[0].endswith(": 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 5 more")
    written = json.loads(out.read_text())["not_read"]
    assert written["not a picture by its name"] == [str(folder / f"{i}.csv") for i in range(9)] + [
        str(folder / "labels.txt")
    ]


def test_several_paths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".PNG"))
    assert run(capsys, *paths) == (0, f"{expected(PICTURES[:2])}\n", "")
    other = folder.with_name("others")
    other.mkdir()
    Image.fromarray(PICTURES[0]).save(other / "5.png")
    assert run(capsys, folder, other)[1] == f"{expected([*PICTURES, PICTURES[0]])}\n"
    out = folder / "more" / "out.png"
    assert run(capsys, folder, other, "--plot", out, "--json", folder / "more" / "out.json")[0] == 0
    assert json.loads((folder / "more" / "out.json").read_text())["settings"]["paths"] == [str(folder), str(other)]


def test_arrays_beside_pictures_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "embeddings.npy", STACK)
    text = TEXT.replace("labels.txt", "embeddings.npy, labels.txt")
    assert run(capsys, folder) == (0, f"{expected(PICTURES)}\n", text + SUBFOLDER)


# --- errors ------------------------------------------------------------------------------------


@pytest.fixture
def truncated(folder: Path) -> Path:
    path = folder / "0a.png"
    content = (folder / "0.png").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (folder / "9.png").write_bytes(b"no picture")
    return path


def test_fail_names_the_file(folder: Path, truncated: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_with(f"{truncated}: image file is truncated", capsys, folder, "--workers", workers)


def test_skip_lists_and_counts(folder: Path, truncated: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.json"
    options = ("--on-error", "skip", "--workers", workers, "--json", out, "--plot", folder / "out.png")
    code, table, error = run(capsys, folder, *options)
    assert (code, table) == (0, f"{expected(PICTURES)}\n")
    last = folder / "9.png"
    unknown = f"cannot identify image file {str(last)!r}"
    assert error.splitlines() == [
        f"skipped {truncated}: image file is truncated",
        f"skipped {last}: {unknown}",
        "2 of 7 files were skipped",
        *(TEXT + SUBFOLDER).splitlines(),
    ]
    written = json.loads(out.read_text())
    assert written["skipped"] == {str(truncated): "image file is truncated", str(last): unknown}
    assert written["images"] == 5


def test_no_readable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "only.png"
    path.write_bytes(b"no picture")
    out = tmp_path / "out.json"
    code, table, error = run(capsys, path, "--on-error", "skip", "--json", out)
    assert (code, table) == (2, "")
    reason = f"cannot identify image file {str(path)!r}"
    assert error.splitlines() == [
        f"skipped {path}: {reason}",
        "1 of 1 files were skipped",
        f"normfused stats: error: {path}: no image could be read",
    ]
    written = json.loads(out.read_text())
    assert (written["images"], written["skipped"]) == (0, {str(path): reason})


def test_json_without_finite_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "images.npy", tmp_path / "out.json"
    np.save(path, np.array([[[np.nan], [np.inf]], [[np.nan], [-np.inf]]], dtype=np.float32))
    assert run(capsys, path, "--layout", "HWC", "--json", out)[0] == 0

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    written = json.loads(out.read_text(), parse_constant=no_constant)
    assert (written["mean"], written["min"], written["nonfinite"]) == ([None], [None], [4])
    loaded = ChannelStats.load(out)
    assert loaded.min.item() == -loaded.max.item() == float("inf")


def test_outputs_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = folder / "0.png"
    before = picture.read_bytes()
    (folder / "link.json").symlink_to(picture)
    for option, path in (("--json", picture), ("--plot", picture), ("--json", folder / "link.json")):
        message = f"{option} {path}: is an input, which would be overwritten"
        assert fails_with(message, capsys, folder, option, path)
    assert picture.read_bytes() == before
    assert fails_with(f"--json {tmp_path}: is a folder", capsys, folder, "--json", tmp_path)
    both = tmp_path / "out"
    assert fails_with(f"--json and --plot both name {both}", capsys, folder, "--json", both, "--plot", both)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"normfused {normfused.__version__}\n"


def test_inapplicable_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "images.npy"
    np.save(path, STACK[0])
    message = f"--channels applies to pictures and videos, but {path} contains an array"
    assert fails_with(message, capsys, path, "--channels", "gray")
    assert fails_with(message.replace("channels", "frames"), capsys, path, "--frames", "all")
    message = "--layout applies to arrays; a picture file defines its own layout"
    assert fails_with(message, capsys, folder, "--layout", "HWC")
    assert fails_with(message.replace("layout applies", "key applies"), capsys, folder, "--key", "x")
    assert fails_with(f"{path}: --key names an array of an .npz file", capsys, path, "--key", "x")
    picture = folder / "0.png"
    assert fails_with(f"{picture} is a picture and {path} is an array: pass one kind", capsys, picture, path)
    assert fails_with(f"{picture}: given more than once", capsys, picture, picture)
    layout = (
        "layout must consist of distinct letters, N for images, C for channels and any other for a dimension of an "
    )
    assert run(capsys, path, "--layout", "cc")[2].startswith(f"normfused stats: error: {layout}")
    assert fails_with(f"{path}: --layout NCHW does not fit shape (6, 5)", capsys, path, "--layout", "NCHW")
    assert fails_with(f"{folder / 'more'}: no picture files", capsys, folder / "more")
    message = f"{tmp_path}: no picture files; --recursive searches its subfolders (1)"
    path.unlink()
    assert fails_with(message, capsys, tmp_path)
    message = f"--json {tmp_path}/none/out.json: the folder {tmp_path}/none does not exist"
    assert fails_with(message, capsys, folder, "--json", tmp_path / "none" / "out.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PATH"),
        (["x", "--scale", "0"], "argument --scale: must be positive, got 0"),
        (["x", "--scale", "nan"], "argument --scale: must be finite, got nan"),
        (["x", "--scale", "1/x"], "argument --scale: 'x' is not a number"),
        (["x", "--scale", "1/0"], "argument --scale: must be positive, got 0"),
        (["x", "--scale", "1/2/3"], "argument --scale: '2/3' is not a number"),
        (["x", "--workers", "-1"], "argument --workers: must be at least 0, got -1"),
    ],
)
def test_bad_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["stats", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"normfused stats: error: {message}\n"


def test_missing_packages(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    how = "pip install 'normfused[data]'"
    assert fails_with(f"pillow not installed: {how}", capsys, folder)
    assert fails_with(f"pillow not installed: {how}", capsys, folder / "0.png")
    assert fails_with(f"matplotlib not installed: {how}", capsys, folder, "--plot", "out.png")


# --- output files ------------------------------------------------------------------------------


def test_a_scale_may_be_a_fraction(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(capsys, folder, "--json", tmp_path / "out.json", "--scale", "1/255")
    assert code == 0
    assert ChannelStats.load(tmp_path / "out.json") == expected(PICTURES, scale=1 / 255)


def test_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    code, _, _ = run(capsys, folder, "--json", out, "--scale", "0.5")
    written = json.loads(out.read_text())
    stats = expected(PICTURES, scale=0.5)
    assert code == 0
    assert ChannelStats.from_dict(written["stats"]) == stats == ChannelStats.load(out)
    assert written["settings"]["paths"] == [str(folder)]
    assert written["settings"]["scale"] == 0.5
    assert (written["images"], written["complete"], written["skipped"]) == (5, True, {})
    for name, values in {"mean": stats.mean, "std": stats.std, "min": stats.min, "max": stats.max}.items():
        assert written[name] == values.tolist()
    assert written["count"] == stats.count.tolist()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of histogram.draw."""
    calls: list[Any] = []
    draw = histogram.draw
    monkeypatch.setattr(histogram, "draw", lambda *arguments: calls.append(arguments) or draw(*arguments))
    return calls


@pytest.mark.parametrize(
    ("images", "bins"),
    [
        (PICTURES, lambda column: np.bincount(column, minlength=256)),
        ([p.astype(np.float32) / 99 for p in PICTURES], None),
        ([p.astype(np.int16) * 100 for p in PICTURES], None),
    ],
    ids=["uint8", "float32", "int16"],
)
def test_histogram_counts(
    tmp_path: Path,
    images: list[np.ndarray],
    bins: Callable[[np.ndarray], np.ndarray] | None,
    capsys: pytest.CaptureFixture[str],
    drawn: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, out = tmp_path / "images.npy", tmp_path / "out.png"
    np.save(path, np.stack([image[:6] for image in images]))
    pixels = np.concatenate([image[:6].reshape(-1, 3) for image in images])
    monkeypatch.setattr("normfused.data.arrays._VALUES_AT_A_TIME", 300)
    assert run(capsys, path, "--plot", out)[0] == 0
    counts, stats, low, high, name = drawn[0]
    assert name == "images.npy"
    assert counts.sum(1).tolist() == stats.count.tolist()
    for channel in range(3):
        column = pixels[:, channel]
        expected_counts = bins(column) if bins else np.histogram(column.astype(float), 256, (low, high))[0]
        assert abs(counts[channel].numpy() - expected_counts).sum() <= (0 if bins else 4)  # bin edges may round
    if bins:
        assert (low * 255, high * 255) == pytest.approx((-0.5, 255.5))
    else:
        assert (low, high) == (pixels.min(), pixels.max())
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert np.ptp(np.asarray(picture.convert("L"))) > 100


@pytest.mark.usefixtures("truncated")
def test_histogram_excludes_skipped_files(
    folder: Path, workers: int, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, folder, "--on-error", "skip", "--plot", folder / "out.png", "--workers", workers)[0] == 0
    pixels = np.concatenate([image.reshape(-1, 3) for image in PICTURES])
    assert drawn[0][0].tolist() == [np.bincount(column, minlength=256).tolist() for column in pixels.T]


@pytest.mark.parametrize(
    ("images", "low", "high"),
    [
        (np.full((2, 4, 4, 1), 9, dtype=np.uint8), -0.5 / 255, 255.5 / 255),
        (np.full((2, 4, 4, 1), -9, dtype=np.int16), -9.5, 246.5),
        (np.full((2, 4, 4, 1), 9.0), 8.5, 9.5),
    ],
)
def test_histogram_of_a_constant(
    tmp_path: Path, images: np.ndarray, low: float, high: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert histogram.value_range(expected([images])) == pytest.approx((low, high))
    path, out = tmp_path / "images.npy", tmp_path / "out.png"
    np.save(path, images)
    assert run(capsys, path, "--plot", out)[0] == 0
    assert out.stat().st_size > 1000


def test_no_histogram_without_finite_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "images.npy", tmp_path / "out.png"
    np.save(path, np.full((2, 4, 4, 1), np.nan))
    code, table, error = run(capsys, path, "--plot", out)
    assert code == 2
    assert table.splitlines()[1].endswith("nonfinite")
    assert error == "normfused stats: error: --plot: all values are NaN or infinite\n"
    assert not out.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("$x_{$.npy", "$x_{$.npy"),
        ("\u56fe\u50cf \u00e9.npy", "\\u56fe\\u50cf \u00e9.npy"),
        ("bad\udcff.npy", "bad\\udcff.npy"),
    ],
    ids=["math", "CJK", "surrogate"],
)
def test_names_in_plots(tmp_path: Path, name: str, title: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert histogram._printable(name) == title
    path, out = tmp_path / name, tmp_path / "out.json"
    np.save(path, np.stack([image[:6] for image in PICTURES]))
    assert run(capsys, path, "--plot", tmp_path / "out.png", "--json", out)[0] == 0
    assert json.loads(out.read_text())["settings"]["paths"] == [str(path)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("channels", "inches"), [(1, 3.4), (16, 39.4), (17, 5.8), (300, 5.8)])
def test_plots_of_many_channels_have_a_limited_size(
    tmp_path: Path, channels: int, inches: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "images.npy", tmp_path / "out.png"
    np.save(path, RANDOM.normal(size=(2, channels, 4, 5)))
    assert run(capsys, path, "--layout", "NCHW", "--plot", out)[0] == 0
    with Image.open(out) as picture:
        assert picture.size == (8 * 150, round(inches * 150))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [2, 20])
def test_plots_of_a_channel_without_finite_values(
    tmp_path: Path, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    images = RANDOM.normal(size=(2, channels, 4, 5))
    images[:, 1] = np.nan
    path, out = tmp_path / "images.npy", tmp_path / "out.png"
    np.save(path, images)
    assert run(capsys, path, "--layout", "NCHW", "--plot", out)[0] == 0
    assert out.stat().st_size > 10_000
    images[:] = np.nan
    np.save(path, images)
    code, _, error = run(capsys, path, "--layout", "NCHW", "--plot", out)
    assert (code, error) == (2, "normfused stats: error: --plot: all values are NaN or infinite\n")


# --- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 3])
@pytest.mark.parametrize("thread_bytes", [0, 1 << 60])
def test_interrupted(
    folder: Path,
    tmp_path: Path,
    done: int,
    thread_bytes: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "THREAD_BYTES", thread_bytes)
    read = Pictures.read

    def interrupted(self: Pictures, index: int) -> Any:
        if index == done:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(Pictures, "read", interrupted)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    code, table, error = run(capsys, folder, "--json", out, "--plot", plot)
    stats = expected(PICTURES[:done])
    assert (code, table) == (130, f"{stats}\n")
    assert error == TEXT + SUBFOLDER + f"interrupted: the statistics cover {done} of 5 images\n"
    written = json.loads(out.read_text())
    assert (written["images"], written["complete"]) == (done, False)
    assert ChannelStats.from_dict(written["stats"]).sums == stats.sums
    assert not plot.exists()


def test_interrupted_while_drawing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(histogram, "draw", interrupted)
    code, table, error = run(capsys, folder, "--plot", tmp_path / "out.png")
    assert (code, table) == (130, f"{expected(PICTURES)}\n")
    assert error == TEXT + SUBFOLDER + "interrupted: there is no plot\n"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("workers", "thread_bytes"), [(0, 1 << 60), (0, 0), (2, 0)])
def test_a_real_interrupt(tmp_path: Path, workers: int, thread_bytes: int) -> None:
    out = tmp_path / "out.json"
    arguments = ("--workers", workers, "--json", out)
    code, table, error = signalled(tmp_path, signal.SIGINT, *arguments, thread_bytes=thread_bytes)
    assert code == 130, error
    written = json.loads(out.read_text())
    assert written["complete"] is False
    done = written["images"]
    assert 0 < done < 200
    assert table == f"{expected([np.full((4, 4), i, dtype=np.uint8) for i in range(done)])}\n"
    assert error == f"interrupted: the statistics cover {done} of 200 images\n"
    assert not readers(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("to_group", [False, True])
def test_a_real_sigterm(tmp_path: Path, to_group: bool) -> None:
    """No results, no message, and no process that still reads, whether the workers get the signal too or not."""
    arguments = ("--workers", 2, "--json", tmp_path / "out.json")
    assert signalled(tmp_path, signal.SIGTERM, *arguments, to_group=to_group) == (143, "", "")
    assert not readers(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix not in (".slow", ".pid")]


def test_output_is_the_same_from_python(folder: Path) -> None:
    loaded = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir()) if path.suffix not in ("", ".txt")]
    assert expected(loaded) == expected(PICTURES)
    assert ChannelStats().update(Image.fromarray(PICTURES[0])) == expected(PICTURES[:1])
    with pytest.raises(ValueError, match="a palette image contains indices"):
        ChannelStats().update(RGB.quantize(8))
    assert torch.equal(ChannelStats().update(GRAY).mean, expected([STACK[0]]).mean)
