"""normfused stats of videos, which the tests encode themselves, and of NIfTI volumes."""

from __future__ import annotations

import gzip
import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stats_runs import PICTURES, expected, fails_with, run

from normfused import ChannelStats, dataset_stats
from normfused.data import arrays, paths
from normfused.data.paths import open_source
from normfused.data.sources import Options

av = pytest.importorskip("av")
nibabel = pytest.importorskip("nibabel")

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)


def encode(path: Path, frames: Any, codec: str, pixel_format: str, given: str = "rgb24", **settings: Any) -> Path:
    """A video of these frames. ``settings`` are attributes of the frames."""
    with av.open(path, "w") as container:
        height, width = frames[0].shape[:2] if given != "yuv420p" else (frames[0].shape[0] * 2 // 3, frames[0].shape[1])
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if settings:
            stream.codec_context.colorspace = int(settings["colorspace"])
            stream.codec_context.color_range = settings["color_range"]
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format=given)
            for name, value in settings.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_lossless_video_is_its_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = encode(tmp_path / "video.mkv", FRAMES, "ffv1", "bgr0")
    stats = expected([FRAMES], "NHWC")
    assert run(capsys, path, "--json", tmp_path / "out.json") == (0, f"{stats}\n", "")
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 9
    assert dataset_stats(path) == stats
    assert dataset_stats(str(path), num_workers=2, quantiles=(0.5,)).quantile().tolist() == [
        np.quantile(FRAMES * (1 / 255), 0.5, axis=(0, 1, 2)).tolist()
    ]
    assert run(capsys, path, "--frames", "first") == (0, f"{expected([FRAMES[:1]], 'NHWC')}\n", "")
    assert run(capsys, path, "--frames", "all") == (0, f"{stats}\n", "")


def test_a_gray_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gray = FRAMES[..., 0].copy()
    path = encode(tmp_path / "video.avi", gray, "ffv1", "gray", "gray")
    assert run(capsys, path) == (0, f"{expected([gray], 'NHW')}\n", "")
    three = np.repeat(gray[..., None], 3, axis=-1)
    assert run(capsys, path, "--channels", "rgb") == (0, f"{expected([three], 'NHWC')}\n", "")


def test_opacity_is_a_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rgba = RANDOM.integers(0, 256, (3, 16, 16, 4), dtype=np.uint8)
    path = encode(tmp_path / "video.mov", rgba, "png", "rgba", "rgba")
    assert run(capsys, path) == (0, f"{expected([rgba], 'NHWC')}\n", "")
    assert run(capsys, path, "--channels", "rgb") == (0, f"{expected([rgba[..., :3]], 'NHWC')}\n", "")


@pytest.mark.parametrize(
    ("space", "is_full", "red"),
    [
        ("ITU601", False, (81, 90, 240)),
        ("ITU709", False, (63, 102, 240)),
        ("ITU601", True, (76, 85, 255)),
        ("ITU709", True, (54, 99, 255)),
        (None, False, (81, 90, 240)),
    ],
)
def test_colors_are_those_that_the_file_names(
    tmp_path: Path, space: str | None, is_full: bool, red: tuple[int, int, int]
) -> None:
    """The same red has other numbers in the two standards of color, and in limited and full range."""
    y, u, v = red
    planes = np.concatenate([np.full(32 * 48, y), np.full(16 * 24, u), np.full(16 * 24, v)]).astype(np.uint8)
    settings = (
        {} if space is None else {"colorspace": av.video.reformatter.Colorspace[space], "color_range": 1 + is_full}
    )
    path = encode(tmp_path / "video.mkv", [planes.reshape(48, 48)] * 2, "ffv1", "yuv420p", "yuv420p", **settings)
    mean = (dataset_stats(path).mean * 255).tolist()
    assert mean == pytest.approx([255, 0, 0], abs=2.5)


def test_a_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(tmp_path / "b.mkv", FRAMES[:4], "ffv1", "bgr0")
    encode(tmp_path / "a.MKV", FRAMES[4:], "ffv1", "bgr0")
    (tmp_path / "notes.txt").write_text("two videos")
    done = run(capsys, tmp_path, "--workers", "2", "--plot", tmp_path / "plot.png")
    assert done == (0, f"{expected([FRAMES], 'NHWC')}\n", "not read (not a video by its name): notes.txt\n")
    assert Image.open(tmp_path / "plot.png").size[0] > 100
    Image.fromarray(PICTURES[0]).save(tmp_path / "picture.png")
    (tmp_path / "plot.png").unlink()
    code, out, err = run(capsys, tmp_path)
    assert (code, out) == (0, f"{expected(PICTURES[:1])}\n")
    assert err == "not read (not a picture by its name): a.MKV, b.mkv, notes.txt\n"


def test_frames_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = encode(tmp_path / "video.mkv", FRAMES, "ffv1", "bgr0")
    frames = open_source([path], Options()).read(0)
    first, layout = next(frames)
    assert layout == "HWC"
    assert np.array_equal(first, FRAMES[0])
    assert len(list(frames)) == 8


def test_more_than_8_bits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = RANDOM.integers(0, 1 << 16, (2, 16, 16), dtype=np.uint16)
    path = encode(tmp_path / "video.mkv", wide, "ffv1", "gray16le", "gray16le")
    assert fails_with(f"{path}: format gray16le has 16 bits per sample, of which 8 would be kept", capsys, path)


MOVING = np.stack([np.roll(FRAMES[0], 3 * i, axis=1) for i in range(40)]).repeat(4, 1).repeat(4, 2)


@pytest.mark.parametrize(
    ("codec", "ending"), [("mpeg4", "mp4"), ("mpeg4", "avi"), ("mjpeg", "avi"), ("ffv1", "mkv"), ("mpeg4", "mkv")]
)
def test_truncated_videos(tmp_path: Path, codec: str, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    pixel_format = {"mpeg4": "yuv420p", "mjpeg": "yuvj420p", "ffv1": "bgr0"}[codec]
    path = encode(tmp_path / f"video.{ending}", MOVING, codec, pixel_format)
    assert dataset_stats(path).images == 40
    content = path.read_bytes()
    for share in (0.3, 0.6):
        path.write_bytes(content[: int(len(content) * share)])
        code, out, err = run(capsys, path)
        assert (code, out) == (2, "")
        assert err.startswith(f"normfused stats: error: {path}: ")


def test_damaged_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = encode(tmp_path / "good.mp4", MOVING, "mpeg4", "yuv420p")
    content = bytearray(good.read_bytes())
    for byte in range(len(content) // 2, len(content) // 2 + 40):
        content[byte] ^= 0xFF
    (tmp_path / "damaged.mp4").write_bytes(content)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.avi").write_text("no video")
    for name in ("damaged.mp4", "empty.mp4", "text.avi"):
        code, out, err = run(capsys, tmp_path / name)
        assert (code, out) == (2, "")
        assert err.startswith(f"normfused stats: error: {tmp_path / name}: ")
        assert err.count("\n") == 1
    stats = dataset_stats(good)
    code, out, err = run(capsys, tmp_path, "--on-error", "skip")
    assert (code, out) == (0, f"{stats}\n")
    assert err.splitlines()[-1] == "3 of 4 files were skipped"


def test_a_file_without_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert fails_with(f"{path}: no video stream", capsys, path)


def test_options_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "video.mkv", FRAMES, "ffv1", "bgr0")
    message = "--layout applies to arrays; a video file defines its own layout"
    assert fails_with(message, capsys, path, "--layout", "HWC")
    message = f"{path}: 48 x 32 = 1,536 pixels, more than 1,000: --max-pixels sets the limit"
    assert fails_with(message, capsys, path, "--max-pixels", "1000")
    picture = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(picture)
    assert fails_with(f"{picture} is a picture and {path} is a video: pass one kind", capsys, path, picture)
    monkeypatch.setattr(paths, "has", lambda package: package != "av")
    assert fails_with("PyAV not installed: pip install 'normfused[video]'", capsys, path)


# Volumes.


def save_volume(path: Path, values: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "NII"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
def test_a_volume(tmp_path: Path, dtype: str, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = RANDOM.integers(0, 200, (6, 5, 4)).astype(dtype)
    path = save_volume(tmp_path / f"volume.{ending}", values)
    assert run(capsys, path) == (0, f"{expected([values], 'XYZ')}\n", "")
    assert dataset_stats(path) == expected([values], "XYZ")


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_slope_and_intercept_of_a_volume(tmp_path: Path, ending: str) -> None:
    stored = RANDOM.integers(-1000, 3000, (6, 5, 4)).astype(np.int16)
    content = bytearray(save_volume(tmp_path / "stored.nii", stored).read_bytes())
    content[112:120] = struct.pack("<2f", 0.5, -1024.0)  # scl_slope and scl_inter of the header
    path = tmp_path / f"volume.{ending}"
    path.write_bytes(gzip.compress(content) if ending == "nii.gz" else content)
    stats = dataset_stats(path)
    assert stats.mean.item() == pytest.approx(stored.mean() * 0.5 - 1024)
    assert (stats.min.item(), stats.max.item()) == (stored.min() * 0.5 - 1024, stored.max() * 0.5 - 1024)


def test_a_series_and_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = RANDOM.integers(0, 200, (6, 5, 4, 3)).astype(np.int16)
    path = save_volume(tmp_path / "series.nii", values)
    assert run(capsys, path) == (0, f"{expected([values], 'XYZT')}\n", "")
    assert run(capsys, path, "--layout", "XYZC") == (0, f"{expected([values], 'XYZC')}\n", "")
    assert run(capsys, path, "--layout", "XYZN") == (0, f"{expected([values], 'XYZN')}\n", "")
    vectors = save_volume(tmp_path / "vectors.nii", values[:, :, :, None])
    code, _, err = run(capsys, vectors)
    assert code == 2
    assert err.startswith(
        f"normfused stats: error: {vectors}: images need 2, 3 or 4 dimensions, got shape (6, 5, 4, 1, 3)"
    )
    assert run(capsys, vectors, "--layout", "XYZTC") == (0, f"{expected([values], 'XYZC')}\n", "")


def test_a_folder_of_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volumes = [RANDOM.integers(0, 200, (6, 5, 4 + i)).astype(np.int16) for i in range(3)]
    for i, volume in enumerate(volumes):
        save_volume(tmp_path / f"{i}.nii.gz", volume)
    stats = ChannelStats()
    for volume in volumes:
        stats.update(volume, "XYZ")
    for workers in (0, 2):
        assert run(capsys, tmp_path, "--workers", workers) == (0, f"{stats}\n", "")


def test_volumes_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "volume.nii"
    path.write_bytes(b"no volume" * 100)
    code, _, err = run(capsys, path)
    assert code == 2
    assert err.startswith(f"normfused stats: error: {path}: ")
    assert err.count("\n") == 1
    good = save_volume(path, np.zeros((3, 4, 5), np.int16))
    path.write_bytes(good.read_bytes()[:-10])
    code, _, err = run(capsys, path)
    assert code == 2
    assert err.startswith(f"normfused stats: error: {path}: ")
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    path = save_volume(tmp_path / "rgb.nii", rgb)
    assert "images must be of uint8" in run(capsys, path)[2]
    monkeypatch.setattr(arrays, "has", lambda package: package != "nibabel")
    assert fails_with(f"{path}: nibabel not installed: pip install 'normfused[volumes]'", capsys, path)


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_a_volume_in_numpys_format(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = RANDOM.integers(0, 200, (6, 5, 4)).astype(np.int16)
    path = tmp_path / f"volume.{ending}"
    (np.save if ending == "npy" else np.savez)(path, values)
    assert run(capsys, path, "--layout", "DHW") == (0, f"{expected([values], 'DHW')}\n", "")
    assert "DHW for a volume" in run(capsys, path)[2]
