"""Writers of picture files that Pillow cannot write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits per sample, from uint16 of shape (H, W, C)."""
    height, width, channels = pixels.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def ppm(pixels: np.ndarray) -> bytes:
    """A PPM of 16 bits per sample, from uint16 of shape (H, W, 3)."""
    return b"P6 %d %d 65535\n" % (pixels.shape[1], pixels.shape[0]) + pixels.astype(">u2").tobytes()


def tiff(pixels: np.ndarray) -> bytes:
    """A TIFF of one strip, not compressed, of shape (H, W, C) and any dtype."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    data += bytes(len(data) % 2)
    colors = 3 if channels >= 3 else 1
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {
        256: [width],
        257: [height],
        258: [8 * pixels.itemsize] * channels,
        259: [1],
        262: [2 if colors == 3 else 1],
        273: [8],
        277: [channels],
        278: [height],
        279: [len(data)],
        338: [0] * (channels - colors),
        339: [sample_format] * channels,
    }
    tags = {tag: values for tag, values in tags.items() if values}
    entries, arrays = struct.pack("<H", len(tags)), b""
    arrays_at = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        content = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            arrays += content
            content = struct.pack("<I", arrays_at + len(arrays) - len(content))
        entries += struct.pack("<HHI", tag, 4, len(values)) + content
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + entries + bytes(4) + arrays
