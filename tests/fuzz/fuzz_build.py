"""Builds the fuzz targets, and packs their corpora: one input a line, in hexadecimal.

python tests/fuzz/fuzz_build.py build plans FOLDER      # writes FOLDER/plans; with --memory, under MemorySanitizer;
                                                        # --capability avx512: the kernels of that instruction set
python tests/fuzz/fuzz_build.py unpack plans FOLDER     # writes the inputs of corpus/plans.txt into FOLDER
python tests/fuzz/fuzz_build.py pack plans FOLDER       # writes corpus/plans.txt from the inputs in FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = {
    "plans": [f"csrc/kernels/{name}.cpp" for name in ("cpu/plan", "cuda/plan", "cuda/traffic")],
    # nontemporal.cpp is replaced by the target.
    "kernels": [
        f"csrc/kernels/cpu/{name}.cpp" for name in ("baseline", "merge_ranks", "plan", "value_counts", "workspace")
    ],
}
COMMON = ["-std=c++17", "-O1", "-g1", "-fno-sanitize-recover=all"]
# All checks of -fsanitize=undefined make the kernels take four times as long to compile. cpu_kernels/ has them.
ADDRESS = [
    "-fsanitize=address,signed-integer-overflow,shift,integer-divide-by-zero,bounds",
    "-mllvm",
    "-asan-instrumentation-with-call-threshold=0",
]
# With assertions, std::string is compiled here: what functions inside of libstdc++ initialize is not seen. Lanes of a
# vector past the end of a range can be uninitialized and passed to functions, but must not be stored.
MEMORY = [
    "-fsanitize=memory",
    "-fno-sanitize-memory-param-retval",
    "-D_GLIBCXX_ASSERTIONS",
    "-mllvm",
    "-msan-instrumentation-with-call-threshold=0",
]


def clang() -> str | None:
    """A clang++ with libFuzzer."""
    for name in ("clang++", "clang++-19", "clang++-18", "clang++-17", "clang++-16"):
        compiler = shutil.which(name)
        command = [compiler or "", "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", os.devnull]
        program = b'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
        if compiler and subprocess.run(command, input=program, capture_output=True).returncode == 0:
            return compiler
    return None


def build(
    compiler: str,
    target: str,
    folder: Path,
    sanitizer: Sequence[str] = ADDRESS,
    changed: Mapping[str, Path] | None = None,  # files that replace some
    capability: str = "baseline",
) -> Path:
    """The program of a target. Objects that are in the folder already are used again.

    Under MemorySanitizer, replay.cpp runs the target.
    """
    folder.mkdir(exist_ok=True)
    replaced = changed or {}
    engine = ["tests/fuzz/replay.cpp"] if sanitizer is MEMORY else []
    names = [name.replace("baseline", capability) for name in (f"tests/fuzz/{target}.cpp", *SOURCES[target], *engine)]
    sources = [replaced.get(name, ROOT / name) for name in names]
    include = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests/kernels", HERE)]

    def compile_one(source: Path) -> Path:
        digest = hashlib.sha256(f"{source} {capability}".encode()).hexdigest()[:8]
        compiled = folder / f"{source.stem}-{digest}.o"
        if not compiled.exists():
            flags = [*COMMON, *sanitizer, f"-DNORMFUSED_FUZZ_CAPABILITY={capability}"]
            flags += [*([] if engine else ["-fsanitize=fuzzer-no-link"]), "-Wno-array-bounds"]
            subprocess.run([compiler, *flags, *include, "-c", source, "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "-".join([target, *(path.parent.name for path in replaced.values())])
    libraries = [] if engine else ["-fsanitize=fuzzer"]
    subprocess.run([compiler, sanitizer[0], *libraries, *objects, "-o", program, "-lpthread"], check=True)
    return program


def unpack(target: str, folder: Path) -> Path:
    """Writes the inputs of the corpus into a folder."""
    folder.mkdir(exist_ok=True)
    for number, line in enumerate((HERE / f"corpus/{target}.txt").read_text().splitlines()):
        (folder / f"{number:03}").write_bytes(bytes.fromhex(line))
    return folder


def pack(target: str, folder: Path) -> None:
    """Replaces the corpus by the inputs in a folder."""
    lines = sorted((path.read_bytes().hex() for path in folder.iterdir()), key=lambda line: (len(line), line))
    (HERE / f"corpus/{target}.txt").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "unpack", "pack"])
    parser.add_argument("target", choices=list(SOURCES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--capability", choices=["baseline", "avx2", "avx512"], default="baseline")
    args = parser.parse_args()
    if args.action == "build":
        compiler = clang() or sys.exit("no clang++ with libFuzzer")
        sanitizer = MEMORY if args.memory else ADDRESS
        print(build(compiler, args.target, args.folder, sanitizer, capability=args.capability))
    else:
        {"pack": pack, "unpack": unpack}[args.action](args.target, args.folder)
