"""Array files as ``normfused stats`` reads them: IDX, .npy and .npz, in any layout, or an error."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stats_runs import RANDOM, STACK, expected, fails_with, run

from normfused.data import sources
from normfused.data.paths import open_source
from normfused.data.sources import Options


def npy_bytes(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def damaged_npz(mark: bytes, distance: int) -> bytes:
    """An archive compressed by bzip2, with one byte changed, `distance` bytes after a mark."""
    member, archive = io.BytesIO(), io.BytesIO()
    np.save(member, STACK)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("x.npy", member.getvalue())
    content = bytearray(archive.getvalue())
    content[content.find(mark) + distance] ^= 0x7F
    return bytes(content)


def idx_bytes(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train-images-idx3-ubyte", lambda path: path.write_bytes(idx_bytes(STACK))),
        ("images.gz", lambda path: path.write_bytes(gzip.compress(idx_bytes(STACK)))),
        ("images.npy", lambda path: np.save(path, STACK[..., None])),
        ("images.npz", lambda path: np.savez(path, only=STACK[..., None])),
    ],
)
def test_arrays(tmp_path: Path, name: str, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    write(path)
    assert run(capsys, path) == (0, f"{expected([STACK], 'NHW')}\n", "")


@pytest.mark.parametrize(
    ("array", "layout", "images"),
    [
        (STACK, "NHW", 20),
        (STACK, "CHW", 1),
        (STACK, "HWC", 1),
        (STACK[0], None, 1),
        (STACK[:, None], "NCHW", 20),
        (STACK.reshape(-1, 5), "NC", 120),
    ],
)
def test_layout(
    tmp_path: Path, array: np.ndarray, layout: str | None, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "images.npy"
    np.save(path, array)
    stats = expected([array], layout)
    assert stats.images == images
    assert run(capsys, path, *(("--layout", layout) if layout else ())) == (0, f"{stats}\n", "")


@pytest.mark.parametrize("ending", ["npy", "NPY", "npz", "NPZ"])
def test_a_folder_of_arrays(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, images in (("b", STACK[:3]), ("a", STACK[3:])):
        with (tmp_path / f"{name}.{ending}").open("wb") as file:  # np.save would add an ending
            (np.save if ending.lower() == "npy" else np.savez)(file, images)
    (tmp_path / "labels.txt").write_text("cat")
    done = run(capsys, tmp_path, "--layout", "NHW")
    assert done == (
        0,
        f"{expected([STACK[3:], STACK[:3]], 'NHW')}\n",
        "not read (not an array by its name): labels.txt\n",
    )


def test_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, x=STACK, y=np.arange(20))
    assert run(capsys, path, "--key", "x", "--layout", "NHW") == (0, f"{expected([STACK], 'NHW')}\n", "")
    assert fails_with(f"{path}: contains x, y, not z", capsys, path, "--key", "z")


@pytest.mark.parametrize("layout", ["NCDHW", "CDHW", "TCHW", "THWC", "HWCN", "HWNC", "CN"])
def test_layouts_by_name(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces too: the images need not be the first dimension."""
    monkeypatch.setattr("normfused.data.arrays._VALUES_AT_A_TIME", 100)
    sizes = {"N": 4, "C": 3, "D": 2, "T": 6, "H": 5, "W": 7}
    array = RANDOM.integers(0, 256, [sizes[letter] for letter in layout], dtype=np.uint8)
    path = tmp_path / "images.npy"
    np.save(path, array)
    stats = expected([np.moveaxis(array, layout.index("C"), -1).reshape(-1, 3)], "NC")
    stats.images = sizes["N"] if "N" in layout else 1
    assert run(capsys, path, "--layout", layout) == (0, f"{stats}\n", "")


IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


@pytest.mark.parametrize("name", ["images-idx", "images.gz"])
@pytest.mark.parametrize("kind", IDX_TYPES)
def test_idx_of_any_type(tmp_path: Path, kind: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    array = (STACK.astype(np.int64) - 100).astype(IDX_TYPES[kind])
    content = struct.pack(">BBBB3I", 0, 0, kind, 3, *array.shape) + array.astype(f">{IDX_TYPES[kind]}").tobytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert run(capsys, path) == (0, f"{expected([array], 'NHW')}\n", "")


def test_an_array_is_read_in_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfused.data.arrays._VALUES_AT_A_TIME", 7 * 30)
    path = tmp_path / "images.npy"
    np.save(path, STACK)
    pieces: list[int] = []
    measure = sources.measure
    monkeypatch.setattr(sources, "measure", lambda x, *rest: pieces.append(len(x)) or measure(x, *rest))
    assert run(capsys, path, "--layout", "NHW") == (0, f"{expected([STACK], 'NHW')}\n", "")
    assert pieces == [7, 7, 6]


def test_npy_is_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.npy"
    np.save(path, STACK)
    ((array, layout),) = open_source([path], Options(layout="NHW")).read(0)
    assert layout == "NHW"
    assert isinstance(array, np.memmap)


def test_fashion_mnist(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
    if not path.is_file():
        pytest.skip(f"{path} is missing: apt install dataset-fashion-mnist")
    code, table, _ = run(capsys, path)
    assert code == 0
    assert table.endswith("\nnormfused.transforms.Normalize(mean=[0.2860], std=[0.3530])\n")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("missing.npy", None, "[Errno 2] No such file or directory: '{path}'"),
        ("missing", None, "[Errno 2] No such file or directory: '{path}'"),
        ("a.npy", lambda path: path.write_bytes(b""), "{path}: No data left in file"),
        ("a.npz", lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "{path}: File is not a zip file"),
        ("a.npz", lambda path: np.savez(path, x=STACK, y=STACK), "{path}: contains x, y: --key chooses one"),
        ("a.npz", lambda path: np.savez(path), "{path}: contains no array"),
        (
            "a.npy",
            lambda path: np.save(path, np.array([None])),
            "{path}: Array can't be memory-mapped: Python objects in dtype.",
        ),
        (
            "a.npy",
            lambda path: np.save(path, STACK),
            "{path}: shape (20, 6, 5) is --layout NHW for many grayscale images, HWC or CHW for one image, DHW for a "
            "volume",
        ),
        (
            "a.npy",
            lambda path: np.save(path, STACK.reshape(20, 3, 2, 5)),
            "{path}: images of shape (20, 3, 2, 5) would have 5 channels in layout NHWC, the default for arrays: "
            "pass --layout, such as 'NCHW' for 3 channels, 'NHWC' for 5 channels or 'CDHW' for 20 channels of a volume",
        ),
        (
            "labels-idx1-ubyte",
            lambda path: path.write_bytes(idx_bytes(STACK[0, 0])),
            "{path}: images need 2, 3 or 4 dimensions, got shape (5,): for others pass --layout",
        ),
        (
            "images-idx3-ubyte",
            lambda path: path.write_bytes(idx_bytes(STACK)[:-1]),
            "{path}: sizes (20, 6, 5) need 600 bytes, the file has 599",
        ),
        (
            "images.gz",
            lambda path: path.write_bytes(gzip.compress(b"no IDX")),
            "{path}: not an IDX file: starts with 6e 6f 20 49, not 00 00",
        ),
        (
            "images-idx",
            lambda path: path.write_bytes(idx_bytes(np.zeros(1, np.uint8))[:3] + b"\x46" + b"\0\0\0\1" * 70 + b"x"),
            "{path}: 70 dimensions, more than the 32 of an array",
        ),
        (
            "a.npy",
            lambda path: path.write_bytes(npy_bytes("|V0", (2**62, 1, 1, 1))),
            "{path}: values of dtype |V0, which have no bytes",
        ),
        ("a.npz", lambda path: path.write_bytes(damaged_npz(b"BZh", 1)), "{path}: Invalid data stream"),
        ("a.npz", lambda path: path.write_bytes(damaged_npz(b"PK\5\6", 19)), "{path}: [Errno 22] Invalid argument"),
    ],
)
def test_array_that_cannot_be_used(
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None] | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if write:
        write(path)
    assert fails_with(message.format(path=path), capsys, path)
