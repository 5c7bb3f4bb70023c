"""The command line: ``normfused info``, ``normfused stats`` and ``normfused demo``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import normfused
from normfused.cli import INTERRUPTED
from normfused.data.sources import MAX_PIXELS, Options
from normfused.errors import CommandError

USAGE_ERROR = 2

_DEMO_REQUIREMENTS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}
_LARGEST_SEED = 2**63 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 130 after Ctrl-C.

    Raises:
        SystemExit: by argparse, after ``--help`` (code 0) and for bad arguments (code 2); after SIGTERM (code 143).

    Example:
        >>> main(["info", "--json"])  # doctest: +ELLIPSIS
        {...}
        0
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        with _exit_on_sigterm():
            return command(arguments)
    except KeyboardInterrupt:  # outside of the work that a command can finish with partial results
        print("normfused: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM raises SystemExit. By default it ends the process without any cleanup.

    Then worker processes run on for seconds, and files that are being written stay. Only the main thread can set
    handlers; in another one this does nothing. A handler of the calling program stays.
    """
    is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or not is_default:
        yield
        return

    def terminate(number: int, frame: object) -> NoReturn:
        if sys.platform != "win32":  # there DataLoader has no handler, which reports workers that the same signal ends
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise SystemExit(128 + number)  # a shell's exit code for the signal

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="normfused", description="Fast normalization layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"normfused {normfused.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show versions and how normfused was built")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(command=_info)
    _add_stats(commands)
    _add_demo(commands)
    return parser


def _add_stats(commands: Any) -> None:
    stats = commands.add_parser(
        "stats",
        help="mean and standard deviation of the channels of images",
        description="Mean, standard deviation and range of each channel, over all pixels of all images.",
        epilog="Exit codes: 0, also where unreadable files were skipped; 2 for bad arguments and unreadable input; "
        "130 after Ctrl-C, with the statistics of the images so far; 143 after SIGTERM, without results.",
    )
    add = stats.add_argument
    add(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="pictures, videos, arrays (IDX, also .gz; .npy, .npz; NIfTI), and folders of one kind of these",
    )
    add(
        "--layout",
        metavar="L",
        help="layout of an array: a letter for each dimension, N images, C channels, as NHW, NCHW or CDHW "
        "(default: HW, NHWC; NHW for IDX, XYZT for NIfTI)",
    )
    add("--key", metavar="NAME", help="the array of an .npz file that has several")
    add("--scale", type=_scale, metavar="S", help="multiply values by S (default: 1/255 for 8 bits, else 1)")
    add("--nodata", type=_finite, metavar="V", help="leave out the values V, which stand for missing ones")
    add(
        "--quantiles",
        type=_quantiles,
        default=(),
        metavar="Q,...",
        help="quantiles, as 0.01,0.99: exact for up to 16 bits, else within 0.05 %%",
    )
    add(
        "--channels",
        choices=("gray", "rgb"),
        help="convert pictures and frames (default: as stored, palettes as RGB without their transparency)",
    )
    add(
        "--frames",
        choices=("first", "all"),
        help="of videos (default: all), of animations and files with several pages (default: an error)",
    )
    add(
        "--max-pixels",
        type=_integer(1),
        default=MAX_PIXELS,
        metavar="N",
        help="refuse larger pictures and frames (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write settings, figures and exact sums")
    add("--plot", type=Path, metavar="FILE", help="draw a histogram (PNG); reads the images a second time")
    workers = "processes that decode files (default: this process)"
    add("--workers", type=_integer(0), default=0, metavar="N", help=workers)
    add("--on-error", choices=("fail", "skip"), default="fail", help="at an unreadable file (default: fail)")
    add("--recursive", action="store_true", help="search subfolders")
    stats.set_defaults(command=_stats)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small network with and without batch norm",
        description="Train a small network with and without batch norm, and with torch.nn's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add("--experiment", choices=("cnn", "mlp", "resnet", "groupnorm"), default="cnn", help="the network")
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
        help="shuffle the images in each epoch; default: stored order, as in the course",
    )
    add("--epochs", type=_integer(1), default=10, metavar="N", help="epochs per run")
    add("--seed", type=_integer(0, _LARGEST_SEED), default=50, metavar="N", help="random seed of all runs")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device")
    add(
        "--out",
        type=Path,
        default=Path("normfused-demo"),
        metavar="DIR",
        help="folder for curves.png and results.json",
    )
    demo.set_defaults(command=_demo)


def _integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A parser of integers from ``minimum`` to ``maximum``, inclusive."""

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


def _positive(text: str) -> float:
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _scale(text: str) -> float:
    """Return a positive number, which may be written as a fraction such as 1/255."""
    numerator, slash, denominator = text.partition("/")
    return _positive(numerator) / _positive(denominator) if slash else _positive(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def _quantiles(text: str) -> tuple[float, ...]:
    numbers = tuple(map(_finite, text.split(",")))
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return numbers


def _info(arguments: argparse.Namespace) -> int:
    info = normfused.info()
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
    else:
        print("\n".join(f"{key}: {value}" for key, value in info.items()))
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from normfused.cli import stats  # imported here, so that other commands start faster

    names = ("layout", "key", "channels", "frames", "recursive", "max_pixels")
    settings = stats.Settings(
        paths=arguments.paths,
        reading=Options(**{name: getattr(arguments, name) for name in names}),
        scale=arguments.scale,
        nodata=arguments.nodata,
        quantiles=arguments.quantiles,
        json=arguments.json,
        plot=arguments.plot,
        workers=arguments.workers,
        skip=arguments.on_error == "skip",
    )
    try:
        return stats.run_stats(settings)
    except (CommandError, OSError) as error:
        return _fail("stats", str(error))


def _demo(arguments: argparse.Namespace) -> int:
    missing = [package for module, package in _DEMO_REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _fail("demo", f"{', '.join(missing)} not installed: pip install 'normfused[demo]'")

    from normfused.cli import demo  # imported here, because it needs optional packages

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
        return _fail("demo", str(error))


def _fail(command: str, message: str) -> int:
    print(f"normfused {command}: error: {message}", file=sys.stderr)
    return USAGE_ERROR
