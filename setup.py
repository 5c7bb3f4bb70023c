"""The parts of the build that pyproject.toml cannot express: version, torch requirement and extension."""

import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

if int(__version__.split(".")[0]) < 77:  # its message about pyproject.toml would not name the reason
    raise SystemExit(f"normfused: setuptools 77 or newer is needed, this is {__version__}")

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_backend"))

VERSION = (ROOT / "normfused" / "_version.py").read_text().split('"')[1]


class NoTorch(build_ext):
    """Replaces torch's build step for metadata and source distributions, which need no torch."""

    def run(self) -> None:
        """Exit with one line of explanation."""
        raise SystemExit(
            "normfused: no torch to build against: install torch, or build with isolation, which asks for it"
        )


if find_spec("torch") and "sdist" not in sys.argv:
    from extension import BuildExtension, extension, torch_requirement, version_label

    compiled, build, torch, label = extension(), BuildExtension, torch_requirement(), version_label()
else:
    compiled, build, torch, label = Extension("normfused._C", []), NoTorch, "torch>=2.6", ""

setup(
    version=VERSION + label,
    install_requires=[torch, "numpy>=1.24"],
    ext_modules=[compiled],
    cmdclass={"build_ext": build},
)
