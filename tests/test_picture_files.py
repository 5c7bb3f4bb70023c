"""Pictures as ``normfused stats`` reads them: the values, channels and frames of their files, or an error."""

from __future__ import annotations

import struct
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import picture_files
import pytest
import tifffile
import torch
from PIL import Image, features
from stats_runs import GRAY, PICTURES, RANDOM, RGB, STACK, expected, fails_with, run

from normfused import dataset_stats
from normfused.data import pictures
from normfused.data.pictures import Pictures
from normfused.data.sources import Files, Options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five RGB pictures."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i, pixels in enumerate(PICTURES):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def one_picture(tmp_path: Path, image: Image.Image, channels: str | None = None, ending: str = "png") -> np.ndarray:
    path = tmp_path / f"picture.{ending}"
    image.save(path)
    ((pixels, _),) = Pictures(Files([path]), Options(channels=channels)).read(0)
    return pixels


def transparent_palette() -> Image.Image:
    image = RGB.quantize(16)
    image.info["transparency"] = bytes(range(16))
    return image


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("image", "channels", "pixels"),
    [
        (GRAY, None, STACK[0]),
        (GRAY, "rgb", np.stack([STACK[0]] * 3, -1)),
        (RGB, None, PICTURES[0]),
        (RGB, "gray", np.asarray(RGB.convert("L"))),
        (RGB.convert("RGBA"), None, np.dstack([PICTURES[0], np.full(PICTURES[0].shape[:2], 255)])),
        (RGB.convert("RGBA"), "rgb", PICTURES[0]),
        (RGB.quantize(16), None, np.asarray(RGB.quantize(16).convert("RGB"))),
        (transparent_palette(), None, np.asarray(RGB.quantize(16).convert("RGB"))),
        (transparent_palette(), "gray", np.asarray(RGB.quantize(16).convert("RGB").convert("L"))),
        (GRAY.convert("1"), None, np.asarray(GRAY.convert("1")) * 255),
        (Image.fromarray(STACK[0].astype(np.uint16) * 257), None, STACK[0].astype(np.int64) * 257),
        (Image.fromarray(STACK[0].astype(np.uint16) * 257), "gray", STACK[0].astype(np.int64) * 257),
    ],
)
def test_modes(tmp_path: Path, image: Image.Image, channels: str | None, pixels: np.ndarray) -> None:
    got = one_picture(tmp_path, image, channels)
    assert got.dtype != bool
    assert (got == pixels).all()


DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
PILLOWS = {("uint8", 1), ("uint8", 3), ("uint16", 1), ("int16", 1), ("int32", 1), ("float32", 1)}  # dtypes and bands


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiff_is_read_as_stored(
    tmp_path: Path, dtype: str, channels: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Pillow, else by tifffile. Without it the file is refused."""
    limits = np.iinfo(dtype) if dtype[0] in "ui" else np.finfo("float32")
    pixels = np.random.default_rng(0).uniform(limits.min / 2, limits.max / 2, (6, 5, channels)).astype(dtype)
    path = tmp_path / "image.tiff"
    path.write_bytes(picture_files.tiff(pixels))
    code, table, error = run(capsys, path)
    wide = {"int16": np.int32, "uint32": np.int64}.get(dtype, pixels.dtype)
    assert (code, table, error) == (0, f"{expected([pixels.astype(wide)], 'HWC')}\n", "")
    if (dtype, channels) in PILLOWS:
        return
    assert fails_in(run(capsys, path, "--channels", "gray"), path, "; --channels cannot convert it\n")
    monkeypatch.setattr(pictures, "has", lambda module: module != "tifffile")
    failed = run(capsys, path)
    assert fails_in(failed, path, "; tifffile reads it: pip install 'normfused[data]'\n")
    assert "which Pillow reads as mode" in failed[2] or "cannot identify image file" in failed[2]


def fails_in(done: tuple[int, str, str], path: Path, message: str) -> bool:
    code, table, error = done
    return (code, table) == (2, "") and error.startswith(f"normfused stats: error: {path}: ") and message in error


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("frames", ["first", "all"])
def test_pages_of_many_bands(tmp_path: Path, planar: str, frames: str, capsys: pytest.CaptureFixture[str]) -> None:
    pages = RANDOM.integers(0, 65536, (3, 6, 5, 7), dtype=np.uint16)
    path = tmp_path / "bands.tif"
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            stored = page if planar == "contig" else np.moveaxis(page, -1, 0)
            file.write(stored, photometric="minisblack", planarconfig=planar)
    assert fails_with(f"{path}: 3 frames or pages: --frames first or --frames all", capsys, path)
    count = {"first": 1, "all": 3}[frames]
    assert run(capsys, path, "--frames", frames) == (0, f"{expected(list(pages[:count]), 'HWC')}\n", "")


def test_a_tiff_whose_first_page_alone_is_ordinary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pages.tif"
    wide = RANDOM.integers(0, 65536, PICTURES[0].shape, dtype=np.uint16)
    with tifffile.TiffWriter(path) as file:
        file.write(STACK[0].astype(np.uint16), photometric="minisblack")
        file.write(wide, photometric="rgb")
    assert run(capsys, path, "--frames", "first") == (0, f"{expected([STACK[0].astype(np.uint16)])}\n", "")
    assert fails_with(
        f"{path}: 2 frames or pages of different shapes: (6, 5, 1), (6, 9, 3)", capsys, path, "--frames", "all"
    )
    with tifffile.TiffWriter(path) as file:
        file.write((wide // 256).astype(np.uint8), photometric="rgb")
        file.write(wide, photometric="rgb")
    message = "2 frames or pages of different dtypes: uint16, uint8"
    assert fails_with(f"{path}: {message}", capsys, path, "--frames", "all")
    with tifffile.TiffWriter(path) as file:
        file.write(wide.astype(np.int32), photometric="minisblack", planarconfig="contig")
        file.write(wide.astype(np.int32), photometric="rgb")
    assert run(capsys, path, "--frames", "all") == (0, f"{expected([wide.astype(np.int32)] * 2, 'HWC')}\n", "")


def test_inks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, RANDOM.integers(0, 65536, (6, 5, 4), dtype=np.uint16), photometric="separated")
    assert fails_with(f"{path}: axes YXS, photometric interpretation SEPARATED: save it as .npy", capsys, path)


def test_max_pixels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first picture has 6 x 9 pixels, the second 7 x 9."""
    limit = "9 x 7 = 63 pixels, more than 62: --max-pixels sets the limit"
    assert fails_with(f"{folder / '1.png'}: {limit}", capsys, folder, "--max-pixels", 62)
    assert run(capsys, folder / "0.png", "--max-pixels", 54)[0] == 0
    wide = RANDOM.integers(0, 65536, (7, 9, 3), dtype=np.uint16)
    path = folder / "wide.tiff"
    path.write_bytes(picture_files.tiff(wide))
    assert fails_with(f"{path}: {limit}", capsys, path, "--max-pixels", 62)


def test_a_picture_above_pillows_own_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = tmp_path / "image.png"
    GRAY.save(path)
    assert run(capsys, path, "--max-pixels", 30) == (0, f"{expected([STACK[0]])}\n", "")
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    "ending", ["pcx", "tga", "sgi", "bmp", "ppm", "png", "webp", "gif", "ras", "im", "tiff", "jp2"]
)
def test_eight_bits_of_any_width_are_accepted(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = RANDOM.integers(0, 256, (5, 700, 3), dtype=np.uint8)
    path = tmp_path / f"image.{ending}"
    try:
        Image.fromarray(pixels).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"Pillow cannot write .{ending}")
    with Image.open(path) as file:
        stored = np.asarray(file.convert("RGB"))
    assert run(capsys, path) == (0, f"{expected([stored])}\n", "")


@pytest.mark.parametrize("channels", ["gray", "rgb", None])
@pytest.mark.parametrize("bands", [2, 3, 4])
def test_sixteen_bits_are_not_reduced_to_eight(
    tmp_path: Path, bands: int, channels: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = RANDOM.integers(0, 65536, (6, 5, bands), dtype=np.uint16)
    (tmp_path / "image.png").write_bytes(picture_files.png(pixels))
    (tmp_path / "image.ppm").write_bytes(picture_files.ppm(pixels[..., :3]))
    (tmp_path / "gray.png").write_bytes(picture_files.png(pixels[..., :1]))
    for name in ("image.png", "image.ppm")[: 2 if bands >= 3 else 1]:
        options = ("--channels", channels) if channels else ()
        code, table, error = run(capsys, tmp_path / name, *options)
        assert (code, table) == (2, "")
        assert "more than 8 bits per sample, of which Pillow keeps 8" in error
    assert run(capsys, tmp_path / "gray.png")[:2] == (0, f"{expected([pixels[..., :1]], 'HWC')}\n")


@pytest.mark.parametrize(
    ("ending", "mark", "offset", "value"),
    [
        ("jp2", b"\xff\x4f\xff\x51", 38, 11),  # the depth - 1 of the first component
        ("jp2", b"\xff\x4f\xff\x51", 44, 0x87),  # the third component is signed
    ],
)
def test_depths_that_decoders_do_not_tell(
    tmp_path: Path, ending: str, mark: bytes, offset: int, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"image.{ending}"
    if not features.check("jpg_2000"):
        pytest.skip("Pillow has no JPEG 2000")
    RGB.resize((16, 16)).save(path)
    assert run(capsys, path)[0] == 0
    content = bytearray(path.read_bytes())
    content[content.index(mark) + len(mark) + offset] = value
    path.write_bytes(content)
    reader = "OpenCV reads it (cv2.IMREAD_UNCHANGED): save it as .npy"
    message = f"{path}: more than 8 bits per sample, of which Pillow keeps 8 in mode RGB; {reader}"
    assert fails_with(message, capsys, path)


def test_the_depth_of_avif(tmp_path: Path) -> None:
    """Pillow writes 8 bits only, and does not open a file whose header alone says more."""
    path = tmp_path / "image.avif"
    if not features.check("avif"):
        pytest.skip("Pillow has no AVIF")
    RGB.resize((16, 16)).save(path)
    file = types.SimpleNamespace(format="AVIF", filename=str(path), tile=[])
    assert not pictures._is_deep(file)
    content = bytearray(path.read_bytes())
    content[content.index(b"av1C") + 6] |= 0x40
    path.write_bytes(content)
    assert pictures._is_deep(file)


def test_sixteen_bits_of_sgi(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.sgi"
    RGB.save(path, bpc=2)
    assert fails_in(run(capsys, path), path, "more than 8 bits per sample, of which Pillow keeps 8 in mode RGB")


def test_sixteen_bits_per_pixel_are_fewer_than_eight_per_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bitmap of 5, 6 and 5 bits."""
    path = tmp_path / "image.bmp"
    rows = RANDOM.integers(0, 65536, (4, 6), dtype="<u2").tobytes()
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 6, 4, 1, 16, 3, len(rows), 0, 0, 0, 0)
    path.write_bytes(struct.pack("<2sIII", b"BM", 66 + len(rows), 0, 66) + header + masks + rows)
    with Image.open(path) as file:
        stored = np.asarray(file)
    assert run(capsys, path) == (0, f"{expected([stored])}\n", "")


def test_premultiplied_colors_are_read_as_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["assocalpha"])
    assert run(capsys, path) == (0, f"{expected([pixels])}\n", "")
    monkeypatch.setattr(pictures, "has", lambda module: module != "tifffile")
    assert fails_in(run(capsys, path), path, "colors multiplied by the opacity, by which Pillow divides them; tifffile")


def test_max_pixels_of_every_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pages.tif"
    Image.new("L", (9, 6)).save(path, save_all=True, append_images=[Image.new("L", (70, 60))])
    message = f"{path}: 70 x 60 = 4,200 pixels, more than 4,199: --max-pixels sets the limit"
    assert fails_with(message, capsys, path, "--frames", "all", "--max-pixels", 4199)


@pytest.mark.parametrize("ending", ["tiff", "png", "webp", "gif"])
def test_several_frames(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"three.{ending}"
    frames = [Image.fromarray(image.repeat(4, 0)).convert("RGB") for image in STACK[:3]]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    pixels = []
    with Image.open(path) as file:
        for number in range(3):
            file.seek(number)
            pixels.append(np.asarray(file.convert("RGB")))
    assert fails_with(f"{path}: 3 frames or pages: --frames first or --frames all", capsys, path)
    assert run(capsys, path, "--frames", "first") == (0, f"{expected(pixels[:1])}\n", "")
    assert run(capsys, path, "--frames", "all") == (0, f"{expected(pixels)}\n", "")
    assert run(capsys, path, "--frames", "all", "--channels", "gray")[0] == 0


def test_all_frames_of_gray_pages_and_of_single_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, folder, "--frames", "all")[1] == f"{expected(PICTURES)}\n"
    path = folder / "more" / "two.tiff"
    GRAY.save(path, save_all=True, append_images=[Image.fromarray(STACK[1])])
    assert run(capsys, path, "--frames", "all") == (0, f"{expected([STACK[0], STACK[1]])}\n", "")
    GRAY.save(path, save_all=True, append_images=[GRAY.crop((0, 0, 2, 2))])
    code, table, error = run(capsys, path, "--frames", "all")
    assert (code, table) == (2, "")
    assert "2 frames or pages of different shapes: (2, 2, 1), (6, 5, 1)" in error


def test_the_photograph_of_a_phone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "photo.mpo"
    RGB.save(path, format="MPO", save_all=True, append_images=[RGB])
    with Image.open(path) as file:
        assert file.n_frames == 2
        stored = np.asarray(file)
    path.rename(path.with_suffix(".jpg"))
    assert run(capsys, path.with_suffix(".jpg")) == (0, f"{expected([stored])}\n", "")


def test_sixteen_bits_and_rgb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(STACK[0].astype(np.uint16)).save(path)
    code, _, error = run(capsys, path, "--channels", "rgb")
    assert code == 2
    assert error.startswith(f"normfused stats: error: {path}: Pillow cannot convert mode I")
    code, table, _ = run(capsys, path)
    assert table == f"{expected([STACK[0].astype(np.uint16)])}\n"


def test_mixed_channel_counts(folder: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    GRAY.save(folder / "3a.png")
    hint = "--channels gray or --channels rgb converts all pictures"
    message = f"{folder / '3a.png'}: channels: got 1, but the images before have 3; {hint}"
    assert fails_with(message, capsys, folder, "--workers", workers)
    assert fails_with(message, capsys, folder, "--on-error", "skip")
    gray = [np.asarray(Image.fromarray(p).convert("L")) for p in PICTURES]
    table = f"{expected([*gray[:4], STACK[0], gray[4]])}\n"
    assert run(capsys, folder, "--channels", "gray") == (
        0,
        table,
        "not read (subfolder, which --recursive searches): more\n",
    )
    table = run(capsys, folder, "--channels", "rgb")[1]
    assert table == f"{expected([*PICTURES, np.stack([STACK[0]] * 3, -1)])}\n"


def test_large_pictures_are_read_by_threads(folder: Path, monkeypatch: pytest.MonkeyPatch, thread_count: None) -> None:
    """Two at once; what reading sets in the whole process is as before when they are done."""
    together = threading.Barrier(2, timeout=60)
    changed: list[bool] = []
    opened = pictures._opened

    def open_together(path: Path, max_pixels: int) -> Any:
        if path.name < "4.png":  # of five pictures, which are read in pairs
            together.wait()
        changed.append(Image.MAX_IMAGE_PIXELS is None and torch.get_num_threads() == 1)
        return opened(path, max_pixels)

    monkeypatch.setattr(pictures, "_opened", open_together)
    monkeypatch.setattr(pictures, "THREAD_BYTES", 0)
    torch.set_num_threads(2)
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with pytest.warns(RuntimeWarning, match="^not read: subfolder"):
        assert dataset_stats(folder) == expected(PICTURES)
    assert changed == [True] * 5
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (limit, filters)
    of_new_threads: list[int] = []
    thread = threading.Thread(target=lambda: of_new_threads.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert of_new_threads == [torch.get_num_threads()] == [2]


@pytest.mark.parametrize(("sizes", "threads"), [([100, 100], False), ([1, 1 << 20], True), ([None, 1 << 14], False)])
def test_small_pictures_are_read_by_one_thread(tmp_path: Path, sizes: list[int | None], threads: bool) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        if size is not None:
            path.write_bytes(bytes(size))
    assert Pictures(Files(paths), Options()).may_use_threads == threads
