"""The rules for wheels that are distributed: file name, contents, requirement, libraries. Builds no wheel."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "release"))
from wheel_checks import (
    check_audit,
    check_contents,
    check_label,
    check_paths,
    check_tag,
    check_wheel,
    newest_symbols,
    parse_name,
    series,
)

NAME = "normfused-0.1.0+torch2.13.cpu-cp311-cp311-manylinux_2_34_x86_64.whl"
EXTENSION = "normfused/_C.cpython-311-x86_64-linux-gnu.so"
CONTENTS = [
    "normfused/__init__.py",
    "normfused/data/stats.py",
    "normfused/py.typed",
    "normfused/_build_info.json",
    EXTENSION,
    "normfused-0.1.0+torch2.13.cpu.dist-info/METADATA",
]
RECORD = {
    "version": "0.1.0+torch2.13.cpu",
    "torch": "2.13.0+cpu",
    "torch_cuda": None,
    "cuda": False,
    "cuda_reason": "NORMFUSED_CUDA=0",
    "compiler": "c++ (GCC) 12.2.0/x",
}
CUDA_RECORD = {
    **RECORD,
    "version": "0.1.0+torch2.13.cu130",
    "torch": "2.13.0+cu130",
    "torch_cuda": "13.0",
    "cuda": True,
}
METADATA = """Metadata-Version: 2.4
Name: normfused
Version: 0.1.0+torch2.13.cpu
Requires-Dist: torch==2.13.*
Requires-Dist: torchvision>=0.1; extra == "any"
Requires-Dist: numpy>=1.24
"""
AUDIT = {
    "sym_tag": "manylinux_2_34_x86_64",
    "external_libs": {"libc10.so": None, "libtorch_cpu.so": None, "libcudart.so.13": None},
    "versioned_symbols": {
        "libc.so.6": ["GLIBC_2.2.5", "GLIBC_2.32", "GLIBC_2.4"],
        "libm.so.6": ["GLIBC_2.29"],
        "libstdc++.so.6": ["GLIBCXX_3.4", "GLIBCXX_3.4.21", "CXXABI_1.3.9", "CXXABI_1.3.11", "CXXABI_FLOAT128"],
    },
}


def test_a_wheels_name_is_split() -> None:
    assert parse_name(NAME) == ("0.1.0", "torch2.13.cpu", "cp311", "manylinux_2_34_x86_64")
    assert parse_name("normfused-0.1.0-cp310-cp310-linux_x86_64.whl") == ("0.1.0", "", "cp310", "linux_x86_64")


@pytest.mark.parametrize(
    "name",
    [
        "normfused-0.1.0.tar.gz",
        "normfused-0.1.0-1-cp311-cp311-linux_x86_64.whl",  # a build number
        "normfused-0.1.0-py3-none-any.whl",
        "normfused-0.1.0-cp311-cp312-linux_x86_64.whl",
        "other-0.1.0-cp311-cp311-linux_x86_64.whl",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not normfused-VERSION\[\+LABEL\]"):
        parse_name(name)


def test_the_series_of_torch() -> None:
    assert [series(v) for v in ("2.13.0+cpu", "2.6.0", "2.15.0a0+git1")] == ["2.13", "2.6", "2.15"]


CHANGELOG = "# Changelog\n\n## {}\n\n- a layer\n\n## 0.0.9 - 2026-01-02\n"


def test_a_tag_names_the_version_of_the_sources_and_of_the_changelog() -> None:
    assert check_tag("v0.1.0", "0.1.0", CHANGELOG.format("0.1.0 - 2026-11-28")) == []
    assert check_tag("v0.2.0", "0.1.0", CHANGELOG.format("0.1.0 - 2026-11-28")) == [
        "the tag is v0.2.0, but normfused/_version.py has 0.1.0"
    ]


@pytest.mark.parametrize("heading", ["Unreleased", "0.1.0", "0.1.0 - soon", "0.1.00 - 2026-11-28"])
def test_a_changelog_without_the_version_and_its_date_is_refused(heading: str) -> None:
    assert check_tag("v0.1.0", "0.1.0", CHANGELOG.format(heading)) == [
        f"the newest section of CHANGELOG.md is {heading}, not 0.1.0 - YYYY-MM-DD"
    ]
    assert check_tag("v0.1.0", "0.1.0", "# Changelog\n")[0].startswith("the newest section of CHANGELOG.md is missing")


def test_the_contents_of_a_good_wheel() -> None:
    assert check_contents(CONTENTS) == []


@pytest.mark.parametrize("missing", ["normfused/__init__.py", "normfused/py.typed", "normfused/_build_info.json"])
def test_missing_files_are_named(missing: str) -> None:
    assert check_contents([name for name in CONTENTS if name != missing]) == [f"{missing} is missing"]


@pytest.mark.parametrize(
    "stray",
    [
        "tests/test_masks.py",
        "normfused/tests/common.py",
        "normfused/test_masks.py",
        "benchmarks/report.py",
        "normfused/csrc/binding.py",
        "csrc/binding.cpp",
        "normfused.libs/libtorch_cpu-1234.so",
        "normfused/libc10.so",
        "normfused/notes.txt",
        "other-1.0.dist-info/METADATA",
    ],
)
def test_stray_files_are_named(stray: str) -> None:
    assert check_contents([*CONTENTS, stray]) == [f"{stray} does not belong in a wheel"]


def test_there_is_one_extension() -> None:
    without = [name for name in CONTENTS if name != EXTENSION]
    other = "normfused/_C.cpython-310-x86_64-linux-gnu.so"
    assert check_contents(without) == ["one extension is needed, found []"]
    assert check_contents([*CONTENTS, other]) == [f"one extension is needed, found {[EXTENSION, other]}"]


def test_label_requirement_and_record_agree() -> None:
    assert check_label(parse_name(NAME), METADATA, RECORD) == []
    cuda = NAME.replace("cpu", "cu130"), METADATA.replace("cpu", "cu130")
    assert check_label(parse_name(cuda[0]), cuda[1], CUDA_RECORD) == []


OTHER_LABEL = "the label is 'torch2.13.cpu', but the build was for torch2.14.cpu"


@pytest.mark.parametrize(
    ("metadata", "record", "problem"),
    [
        (METADATA, {**RECORD, "torch": "2.14.1"}, OTHER_LABEL),
        (METADATA, CUDA_RECORD, "the label is 'torch2.13.cpu', but the build was for torch2.13.cu130"),
        (
            METADATA,
            {**RECORD, "version": "0.1.0"},
            "_build_info.json has version 0.1.0, the file name 0.1.0+torch2.13.cpu",
        ),
        (
            METADATA.replace("torch==2.13.*", "torch>=2.6"),
            RECORD,
            "the wheel requires ['torch>=2.6'], but was built with torch 2.13",
        ),
        (
            METADATA.replace("torch==2.13.*\n", "numpy\n"),
            RECORD,
            "the wheel requires [], but was built with torch 2.13",
        ),
        (
            METADATA.replace("0.1.0+torch2.13.cpu", "0.1.0"),
            RECORD,
            "METADATA has version 0.1.0, the file name 0.1.0+torch2.13.cpu",
        ),
    ],
)
def test_disagreements_are_named(metadata: str, record: dict[str, Any], problem: str) -> None:
    assert problem in check_label(parse_name(NAME), metadata, record)


def test_a_wheel_without_a_label_is_refused() -> None:
    problems = check_label(parse_name(NAME.replace("+torch2.13.cpu", "")), METADATA, RECORD)
    assert "the label is '', but the build was for torch2.13.cpu" in problems


def test_absolute_paths_in_the_record_are_named() -> None:
    assert check_paths(json.dumps(RECORD)) == []
    leak = {**RECORD, "cuda_reason": "no nvcc in CUDA_HOME=/opt/cuda, PATH"}
    assert check_paths(json.dumps(leak)) == ["_build_info.json contains the path /opt/cuda as cuda_reason"]


def test_libraries_of_torch_and_cuda_are_external() -> None:
    assert check_audit(AUDIT) == []
    audit = copy.deepcopy(AUDIT)
    audit["external_libs"]["libgomp.so.1"] = "/usr/lib/libgomp.so.1"
    assert check_audit(audit) == ["the extension links libgomp.so.1, which neither the system nor torch provides"]


def test_a_wheel_without_a_manylinux_tag_is_refused() -> None:
    expected = ["the symbols it needs fit no manylinux tag, but linux_x86_64"]
    assert check_audit({**AUDIT, "sym_tag": "linux_x86_64"}) == expected
    assert check_audit({"error": "no ELF file"}) == ["no ELF file"]


def test_the_newest_symbols_are_compared_as_numbers() -> None:
    assert newest_symbols(AUDIT) == {"CXXABI": "1.3.11", "GLIBC": "2.32", "GLIBCXX": "3.4.21"}


def wheel(folder: Path, names: list[str], record: dict[str, Any]) -> Path:
    """A wheel with these files."""
    texts = {"normfused/_build_info.json": json.dumps(record), CONTENTS[-1]: METADATA}
    with ZipFile(folder / NAME, "w") as archive:
        for name in ["normfused/", *names]:
            archive.writestr(name, texts.get(name, ""))
    return folder / NAME


def test_all_checks_are_applied_to_a_wheels_file(tmp_path: Path) -> None:
    assert check_wheel(wheel(tmp_path, CONTENTS, RECORD)) == []
    leaking = wheel(tmp_path, CONTENTS, {**RECORD, "compiler": "/usr/bin/c++ 12.2.0", "torch": "2.14.1"})
    assert check_wheel(leaking) == [
        OTHER_LABEL,
        "the wheel requires ['torch==2.13.*'], but was built with torch 2.14",
        "_build_info.json contains the path /usr/bin/c++ as compiler",
    ]
    assert check_wheel(wheel(tmp_path, CONTENTS[1:], RECORD)) == ["normfused/__init__.py is missing"]
