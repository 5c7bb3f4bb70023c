"""What pyproject.toml cannot say: the version, the torch requirement and the extension."""

import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_backend"))

VERSION = (ROOT / "normfused" / "_version.py").read_text().split('"')[1]

if find_spec("torch"):
    from extension import BuildExtension, extension, torch_requirement

    compiled, commands, torch = extension(), {"build_ext": BuildExtension}, torch_requirement()
else:  # enough for metadata and sdist; the backend asks for torch before it builds anything
    compiled, commands, torch = Extension("normfused._C", []), {}, "torch>=2.6"

setup(
    version=VERSION,
    install_requires=[torch, "numpy>=1.24"],
    ext_modules=[compiled],
    cmdclass=commands,
)
