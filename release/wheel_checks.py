"""What a release and its wheels must state, contain and link. Each check returns the problems it finds."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from email import message_from_string
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

REQUIRED = ("normfused/__init__.py", "normfused/py.typed", "normfused/_build_info.json")
ALLOWED = ("normfused/*.py", "normfused/_C.*.so", *REQUIRED[1:], "normfused-*.dist-info/*")
NOT_ALLOWED = ("*/tests/*", "*/test_*", "*/benchmarks/*", "*/csrc/*")
# Not part of the wheel: torch and its packages install them. A copy would be a second library of the same name.
EXTERNAL = ("libc10*.so", "libtorch*.so", "libcudart.so.*")


class Name(NamedTuple):
    """The parts of a wheel's file name."""

    version: str  # such as "0.1.0"
    label: str  # the local version, such as "torch2.13.cpu"; empty without one
    python: str
    platform: str


def parse_name(name: str) -> Name:
    """Split a wheel's file name. It may have no build number: the label distinguishes the wheels of one version."""
    match = re.fullmatch(r"normfused-([\w.]+)(?:\+([\w.]+))?-(cp\d+)-\3-([\w.]+)\.whl", name)
    if match is None:
        raise ValueError(f"{name} is not normfused-VERSION[+LABEL]-cpXY-cpXY-PLATFORM.whl")
    return Name(match[1], match[2] or "", match[3], match[4])


def series(torch: str) -> str:
    """Return the series of a version of torch: ``"2.13"`` of ``"2.13.0+cpu"``."""
    return ".".join(torch.split("+")[0].split(".")[:2])


def check_tag(tag: str, version: str, changelog: str) -> list[str]:
    """Check that a tag and the newest section of the changelog name this version, and that the section has a date."""
    problems = [] if tag == f"v{version}" else [f"the tag is {tag}, but normfused/_version.py has {version}"]
    newest = re.search(r"^## (.*)$", changelog, re.MULTILINE)
    heading = newest[1] if newest else "missing"
    if not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", heading):
        problems.append(f"the newest section of CHANGELOG.md is {heading}, not {version} - YYYY-MM-DD")
    return problems


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_contents(names: Collection[str]) -> list[str]:
    """Check the names of the files: the package, one extension, and nothing else."""
    problems = [f"{name} is missing" for name in REQUIRED if name not in names]
    problems += [
        f"{name} does not belong in a wheel"
        for name in names
        if not _matches(name, ALLOWED) or _matches(name, NOT_ALLOWED)
    ]
    extensions = [name for name in names if fnmatch(name, "normfused/_C.*.so")]
    return problems if len(extensions) == 1 else [*problems, f"one extension is needed, found {extensions}"]


def check_label(name: Name, metadata: str, record: Mapping[str, Any]) -> list[str]:
    """Check that file name, requirement and record of the build state the same version, series of torch and variant."""
    built = series(str(record["torch"]))
    variant = f"cu{str(record['torch_cuda']).replace('.', '')}" if record["cuda"] else "cpu"
    parsed = message_from_string(metadata)
    requires = [str(line) for line in parsed.get_all("Requires-Dist", []) if re.match(r"torch\b", str(line))]
    problems = []
    if name.label != f"torch{built}.{variant}":
        problems.append(f"the label is {name.label!r}, but the build was for torch{built}.{variant}")
    if requires != [f"torch=={built}.*"]:
        problems.append(f"the wheel requires {requires}, but was built with torch {built}")
    full = f"{name.version}+{name.label}"
    for place, version in {"METADATA": parsed["Version"], "_build_info.json": record["version"]}.items():
        if version != full:
            problems.append(f"{place} has version {version}, the file name {full}")
    return problems


def check_paths(text: str) -> list[str]:
    """Check that the record of the build contains no absolute path."""
    strings = {key: value for key, value in json.loads(text).items() if isinstance(value, str)}
    paths = {key: re.search(r"(?<![\w.])/\w[^\s,;]*", value) for key, value in strings.items()}
    return [f"_build_info.json contains the path {path[0]} as {key}" for key, path in paths.items() if path]


def check_audit(audit: Mapping[str, Any]) -> list[str]:
    """Check the report of ``auditwheel show --json``: it links libraries of the system and of torch only."""
    if "error" in audit:
        return [str(audit["error"])]
    libraries = [name for name in audit["external_libs"] if not _matches(name, EXTERNAL)]
    problems = [f"the extension links {name}, which neither the system nor torch provides" for name in libraries]
    if not str(audit["sym_tag"]).startswith("manylinux"):
        problems.append(f"the symbols it needs fit no manylinux tag, but {audit['sym_tag']}")
    return problems


def newest_symbols(audit: Mapping[str, Any]) -> dict[str, str]:
    """Return the newest version that the extension needs of each family of symbols, such as ``GLIBC`` to ``2.32``."""
    newest: dict[str, tuple[int, ...]] = {}
    for versions in audit["versioned_symbols"].values():
        for family, number in re.findall(r"(\w+)_([\d.]+)\b", " ".join(versions)):
            newest[family] = max(newest.get(family, ()), tuple(map(int, number.split("."))))
    return {family: ".".join(map(str, number)) for family, number in sorted(newest.items())}


def check_wheel(path: Path) -> list[str]:
    """Run all checks of a wheel's file."""
    with ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]  # auditwheel adds folders
        problems = check_contents(names)
        if problems:
            return problems
        record = archive.read("normfused/_build_info.json").decode()
        (metadata,) = (name for name in names if fnmatch(name, "*.dist-info/METADATA"))
        name = parse_name(path.name)
        return check_label(name, archive.read(metadata).decode(), json.loads(record)) + check_paths(record)
