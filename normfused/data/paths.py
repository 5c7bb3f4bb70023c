"""From paths to a source of images."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from normfused.data import pictures
from normfused.data.arrays import Arrays, is_array, is_array_name
from normfused.data.images import check_layout
from normfused.data.pictures import Pictures
from normfused.data.sources import KINDS, Files, Options, Source, find_files, has
from normfused.data.videos import Videos, is_video_name
from normfused.errors import CommandError

# Of the kinds of files: the options that do not apply, and why.
_WITHOUT = {
    "pictures": (("layout", "key"), "applies to arrays; a picture file defines its own layout"),
    "arrays": (("channels", "frames"), "applies to pictures and videos, but {path} contains an array"),
    "videos": (("layout", "key"), "applies to arrays; a video file defines its own layout"),
}
_PACKAGES = {"pictures": ("PIL", "pillow", "data"), "videos": ("av", "PyAV", "video")}


def open_source(paths: list[Path], options: Options) -> Source:
    """The images in files and folders.

    Raises:
        CommandError, OSError: no images, or an option that does not apply to them; the message names the path.
    """
    if options.layout is not None:
        try:
            check_layout(options.layout)
        except ValueError as error:
            raise CommandError(str(error)) from error
    counts = Counter(os.path.realpath(path) for path in paths)
    for path in paths:
        if counts[os.path.realpath(path)] > 1:
            raise CommandError(f"{path}: given more than once")
    files = Files()
    for path in paths:
        if path.is_dir():
            _add_folder(files, path, options.recursive)
        else:
            kind = "videos" if is_video_name(path) else "arrays" if is_array(path) else "pictures"
            getattr(files, kind).append(path)
    kind, *others = files.kinds()
    first = getattr(files, kind)[0]
    if others:
        raise CommandError(
            f"{first} is {KINDS[kind]} and {getattr(files, others[0])[0]} is {KINDS[others[0]]}: pass one kind"
        )
    names, reason = _WITHOUT[kind]
    for name in names:
        if getattr(options, name) is not None:
            raise CommandError(f"--{name} {reason.format(path=first)}")
    _check_package(kind)
    make: dict[str, type[Pictures] | type[Arrays] | type[Videos]]
    make = {"pictures": Pictures, "arrays": Arrays, "videos": Videos}
    return make[kind](files, options)


def _check_package(kind: str) -> None:
    if kind in _PACKAGES:
        module, package, extra = _PACKAGES[kind]
        if not has(module):
            raise CommandError(f"{package} not installed: pip install 'normfused[{extra}]'")


def _add_folder(files: Files, folder: Path, recursive: bool) -> None:
    """Add the pictures of a folder; of a folder without pictures the arrays, of one without arrays the videos."""
    endings = pictures.endings()

    def kind_of(path: Path) -> str:
        if path.suffix.lower() in endings:
            return "pictures"
        return "arrays" if is_array_name(path) else "videos" if is_video_name(path) else "others"

    found = find_files(folder, kind_of, recursive)
    if not found.kinds():
        if found.others:
            _check_package("pictures")
        hint = f"; --recursive searches its subfolders ({len(found.subfolders)})" if found.subfolders else ""
        raise CommandError(f"{folder}: no picture files{hint}")
    for other in found.kinds()[1:]:
        found.others += getattr(found, other)
        setattr(found, other, [])
    files.add(found)
