"""The command line: ``normfused info`` and ``normfused demo``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import normfused
from normfused.errors import CommandError

USAGE_ERROR = 2

_DEMO_REQUIREMENTS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}
_LARGEST_SEED = 2**63 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code.

    Raises:
        SystemExit: as argparse does, after ``--help`` (0) and for bad arguments (2).
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    return command(arguments)


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="normfused", description="Fast normalization layers for PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show versions and how normfused was built")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(command=_info)

    demo = commands.add_parser(
        "demo",
        help="train a small network with and without batch norm",
        description="Train a small network with and without batch norm, and with torch.nn's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add("--experiment", choices=("cnn", "mlp", "resnet"), default="cnn", help="the network")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with IDX files or CIFAR-10, or a torchvision root; without it Fashion-MNIST "
        "where it is installed, else scikit-learn's digits",
    )
    add("--limit", type=_integer(1), metavar="N", help="train with the first N images only")
    add(
        "--shuffle",
        action="store_true",
        help="take the images in another order in each epoch, not as stored like the course",
    )
    add("--epochs", type=_integer(1), default=10, metavar="N", help="epochs per run")
    add("--seed", type=_integer(0, _LARGEST_SEED), default=50, metavar="N", help="of all runs")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    add(
        "--out",
        type=Path,
        default=Path("normfused-demo"),
        metavar="DIR",
        help="folder for curves.png and results.json",
    )
    demo.set_defaults(command=_demo)
    return parser


def _integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Parses an integer of that range, both ends included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {value}")
        return value

    return parse


def _info(arguments: argparse.Namespace) -> int:
    info = normfused.info()
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
    else:
        print("\n".join(f"{key}: {value}" for key, value in info.items()))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    missing = [package for module, package in _DEMO_REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _fail(f"{', '.join(missing)} not installed: pip install 'normfused[demo]'")

    from normfused import demo  # only here: it imports what may be missing

    settings = demo.Settings(
        experiment=arguments.experiment,
        data=arguments.data,
        limit=arguments.limit,
        shuffle=arguments.shuffle,
        epochs=arguments.epochs,
        seed=arguments.seed,
        device=arguments.device,
        out=arguments.out,
    )
    try:
        return demo.run_demo(settings)
    except (CommandError, OSError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"normfused demo: error: {message}", file=sys.stderr)
    return USAGE_ERROR
