"""Proves and measures the CUDA kernels on a GPU within minutes: ``python benchmarks/gpu_check.py run-1``.

Each STAGE has a time limit, its cap, at which all its processes are killed. Its log and verdict are saved as it ends.
``--seconds`` limits all stages together. The results are one archive in the folder ``--out``, or in the folder that the
environment variable OUT names. ``--render`` makes tables and plots from archives, on any machine. benchmarks/README.md
describes the order.

``--rehearse`` runs every stage on small tensors on the CPU, to check commands, caps, archive and tables without a GPU.
Its figures mean nothing and are never published.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import gpu_build
import machine
from gpu_stages import RUNS, STAGES, Context, find_sanitizer
from stage_runner import Run

PATIENCE = 5  # factor on the caps in a rehearsal, which may run on a slower or busy machine


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.render:
        import gpu_render  # imports normfused, which may not be built yet

        return gpu_render.main(arguments.render, arguments.out)
    names = expand(arguments.stages or (STAGES if arguments.rehearse else RUNS["run-1"]))
    if unknown := [name for name in names if name not in STAGES]:
        _parser().error(f"unknown stage {unknown[0]!r}: must be one of {', '.join([*RUNS, *STAGES])}")
    if not arguments.rehearse and (why := why_not(names)):
        _parser().error(why)
    signal.signal(signal.SIGTERM, _terminated)
    where = os.environ.get("OUT")
    out: Path = (arguments.out or (Path(where) if where else gpu_build.FOLDER)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = arguments.seconds or (float("inf") if arguments.rehearse else 540)
    return check(names, out, seconds, rehearsal=arguments.rehearse)


def expand(names: Any) -> list[str]:
    """Replaces names of runs by their stages, and removes duplicates."""
    return list(dict.fromkeys(stage for name in names for stage in RUNS.get(name, (name,))))


def why_not(names: list[str]) -> str | None:
    """Why this machine cannot run the stages, or None. Building alone needs no GPU."""
    import torch

    if torch.cuda.is_available():
        return None
    if names == ["build"] and torch.version.cuda and os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return None
    return f"torch {torch.__version__} sees no CUDA device; --rehearse needs none"


def check(names: list[str], out: Path, seconds: float, *, rehearsal: bool) -> int:
    """Runs the stages and writes one archive to `out`."""
    started = datetime.datetime.now(datetime.timezone.utc)
    kind = "rehearsal" if rehearsal else "gpu_check"
    folder = gpu_build.FOLDER / f"{kind}-{started:%m%d-%H%M%S}-{os.getpid()}"
    archive = out / f"{kind}-{names[0] if len(names) == 1 else names[1]}-{started:%H%M%S}.tar.gz"
    gpu_bytes, header = describe(rehearsal)
    sanitizer = None if rehearsal else find_sanitizer(os.environ.get("CUDA_HOME"))
    context = Context(rehearsal, folder, out if out != gpu_build.FOLDER else None, gpu_bytes, sanitizer)
    run = Run(folder, archive, seconds, {**header, "started": started.isoformat(timespec="seconds")})
    if rehearsal:
        print("rehearsal: small tensors on the CPU; the figures mean nothing")
    try:
        for name in names:
            stage = STAGES[name]
            cap = stage.cap
            if rehearsal:
                tell(name, context)
                cap *= PATIENCE
            run.stage(name, cap, lambda seconds, stage=stage: stage.plan(context, seconds))  # type: ignore[misc]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts = [f"{sum(v.status == s for v in run.verdicts)} {s}" for s in dict.fromkeys(v.status for v in run.verdicts)]
    print(f"{', '.join(counts)}; {archive}, {archive.stat().st_size >> 10} KiB")
    return 0 if all(verdict.status in ("passed", "skipped") for verdict in run.verdicts) else 1


def describe(rehearsal: bool) -> tuple[int, dict[str, Any]]:
    """Sets the environment of the stages. Returns the GPU's bytes of memory, and the header of verdicts.json."""
    header: dict[str, Any] = {
        "rehearsal": rehearsal,
        "sources": gpu_build.sources(),
        "revision": machine.revision(),
    }
    if rehearsal:
        os.environ.update(OMP_NUM_THREADS="1", NORMFUSED_STRICT="1")
        return 0, {**header, "device": "rehearsal"}
    import torch

    os.environ.update(gpu_build.environment())
    if not torch.cuda.is_available():
        return 0, {**header, "device": "none"}
    name = torch.cuda.get_device_name()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    return gpu_bytes, {**header, "device": machine.slug({"device": "cuda", "gpu": name}), "torch": torch.__version__}


def tell(name: str, rehearsed: Context) -> None:
    """Prints what a stage would run on a GPU, and its cap."""
    stage = STAGES[name]
    on_gpu = Context(False, rehearsed.folder, rehearsed.out, 80 << 30, "compute-sanitizer")
    commands = stage.plan(on_gpu, stage.cap)
    print(f"\n{name}: {stage.what}; at most {stage.cap} s. On a GPU:")
    for command in [commands] if isinstance(commands, str) else commands:
        print(f"  $ {command}".replace(str(rehearsed.folder), "RESULTS").replace(f"{gpu_build.ROOT}/", ""))


def _terminated(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)  # an exception, so that the stage's processes are killed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = f"{', '.join(STAGES)}; or a run of several: {', '.join(RUNS)} (default: run-1, in a rehearsal all stages)"
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=stages)
    parser.add_argument("--seconds", type=float, help="limit of all stages (default: 540, in a rehearsal none)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the archive; with --render of the tables")
    parser.add_argument("--rehearse", action="store_true", help="run small tensors on the CPU")
    parser.add_argument("--render", nargs="+", type=Path, metavar="ARCHIVE", help="make tables and plots from archives")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
