"""Every public name has a docstring with an example, and every test file a line in the tests' README.

``pytest --doctest-modules normfused`` runs the examples.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import normfused

DATA = {"__version__", "CIFAR10", "FASHION_MNIST", "IMAGENET"}
MODULES = (normfused, normfused.transforms, normfused.reference)


def public(module: ModuleType) -> list[tuple[str, object]]:
    named = [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__ if name not in DATA]
    return [(name, value) for name, value in named if not isinstance(value, ModuleType)]


@pytest.mark.parametrize(("name", "value"), [item for module in MODULES for item in public(module)])
def test_docstring_has_an_example(name: str, value: object) -> None:
    assert ">>>" in (value.__doc__ or ""), f"{name} has no example"
    assert not isinstance(value, type) or "__doc__" in vars(value), f"{name} inherits its docstring"


def test_the_readme_of_the_tests_lists_every_file() -> None:
    tests = Path(__file__).parent
    listed = (tests / "README.md").read_text()
    assert [path.name for path in sorted(tests.glob("*.py")) if f"`{path.name}`" not in listed] == []
