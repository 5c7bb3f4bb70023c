"""Doctests of the package skip modules whose optional dependencies are not installed."""

from importlib.util import find_spec

_OPTIONAL = {
    "matplotlib": ["normfused/cli/demo/*.py", "normfused/cli/stats/histogram.py"],
    "tqdm": ["normfused/cli/demo/*.py"],
}
collect_ignore_glob = [path for module, paths in _OPTIONAL.items() if find_spec(module) is None for path in paths]
