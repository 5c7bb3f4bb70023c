"""Renders results as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cases import DTYPES, LAYOUTS, OPERATIONS, Traffic, dtype_name
from growth import LEAK_KB, LEVEL, Growth, Level
from measure import Result
from peers import PEERS, not_measured
from targets import TARGETS, Figure, figure

Failures = Sequence[dict[str, str]]


def render(
    machine: dict[str, Any],
    settings: dict[str, Any],
    results: list[Result],
    memory: list[Growth],
    failures: Failures = (),
    levels: Sequence[Level] = (),
    every_case: bool = True,
) -> str:
    """The summary, followed by the tables of all cases if `every_case`."""
    parts = [
        f"# {machine.get('gpu', machine['cpu'])}",
        _describe(machine, settings, results),
        "## Targets",
        "Limit at copy speed: the speedup of moving each byte once, at the speed of a copy into an existing buffer. It "
        "is an upper bound for tensors that do not fit in the caches.",
        _targets(machine["device"], [] if settings["partial"] else results, memory, levels),
    ]
    if results:
        parts += [
            "## Speedup over eager torch",
            "Time of torch / time of normfused, geometric means of the cases' medians. The torch operations are "
            "`torch.nn.BatchNorm2d`, `torch.var_mean` for `channel_moments`, and `x.sum` with `x.square().sum` for "
            "`channel_sums`.",
            _geometric_means(results),
            *_by_peer(results),
            *_by_cache(results),
            "## Slower than torch",
            _slower(results),
            *_slower_than_onednn(results),
        ]
    if failures:
        rows = [(failure["name"], failure["error"].replace("|", "\\|")) for failure in failures]
        parts += ["## Wrong or not measured", table(("case", "reason"), rows, text_columns=2)]
    return "\n\n".join([*parts, *(_details(results) if every_case else [])]) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table. Columns after the first `text_columns` are right-aligned."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _describe(machine: dict[str, Any], settings: dict[str, Any], results: list[Result]) -> str:
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores ({caches}), {machine['cpu_capability']}, "
        f"{machine['threads']} threads, load {machine['load_average']} before the run",
        f"normfused {machine['normfused']} ({machine['revision']}), torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['compiler'] or 'compiler not recorded'}",
        f"{machine['date']}; {settings['seconds_per_case']} s and at least {settings['least_rounds']} rounds per case",
    ]
    if runs := settings.get("runs"):
        lines[2] = f"Medians of {len(runs)} runs, {', '.join(runs)}; in each {lines[2].partition('; ')[2]}"
    if version := settings.get("onednn"):
        lines[1] += f", oneDNN {version}"
    lines += not_measured(settings.get("missing_peers", {}))
    if settings.get("graphs"):
        lines.append("Each call is the replay of a CUDA graph")
    if uncovered := sum(sum(r.get("uncovered", {}).values()) for r in results):
        lines.append(f"**{uncovered} samples may include host time.**")
    if settings.get("tiny"):
        lines.append("**A rehearsal: tiny tensors, two rounds; no figures.**")
    elif settings["partial"]:
        lines.append("**Part of the grid, or few rounds: do not quote these figures.**")
    return "  \n".join(lines)


def _targets(device: str, results: list[Result], memory: list[Growth], levels: Sequence[Level]) -> str:
    rows = []
    for target in TARGETS:
        if target.device != device:
            continue
        value = target.value(results)
        measured = "–" if value is None else f"{value:.2f}×"
        ceiling = target.ceiling(results)
        verdict = "not measured in full" if value is None else "reached" if target.reached(value) else "**not reached**"
        limit = "" if ceiling is None else f"{ceiling:.2f}×"
        rows.append((target.title, target.statistic, target.requirement, measured, limit, verdict))
    for growth in memory:
        kb = growth["host_kb"] + growth["device_kb"]
        title = f"Memory growth over {growth['steps']:,} training steps, {growth['peer']}"
        ours = growth["peer"] == "normfused"
        verdict = "" if not ours else "reached" if kb < LEAK_KB else "**not reached**"
        rows.append((title, "", f"< {LEAK_KB:.0f} kB" if ours else "", f"{kb:+.0f} kB", "", verdict))
    rows += [_level(level) for level in levels]
    header = ("measurement", "statistic", "target", "measured", "limit at copy speed", "")
    return table(header, rows, text_columns=2)


def _level(level: Level) -> tuple[str, ...]:
    ratio = level["second_half_mb"] / level["first_half_mb"]
    title = f"Memory of {level['steps']:,} training steps of varying sizes, second half / first half, {level['peer']}"
    measured = f"{ratio:.3f}× ({level['first_half_mb']:.0f} MB, of which the pool at most {level['pool_mb']:.0f} MB)"
    ours = level["peer"] == "normfused"
    verdict = "" if not ours else "reached" if ratio <= LEVEL else "**not reached**"
    return title, "maximum", f"≤ {LEVEL}×" if ours else "", measured, "", verdict


def _geometric_means(results: list[Result]) -> str:
    columns = [(dtype_name(dtype), layout) for dtype in DTYPES for layout in LAYOUTS]
    rows = []
    for operation, info in OPERATIONS.items():
        group = [r for r in results if r["operation"] == operation]
        if not group:
            continue
        cells = [[r for r in group if (r["dtype"], r["layout"]) == column] for column in columns]
        slowest = min(group, key=lambda r: figure(r, "speedup"))
        minimum = f"{figure(slowest, 'speedup'):.2f} ({_case(slowest)})"
        rows.append((info.title, *map(_mean, cells), _mean(group), minimum))
    header = ["operation", *(f"{dtype} {layout}" for dtype, layout in columns), "all", "minimum"]
    return table(header, rows)


def _mean(results: list[Result], name: Figure = "speedup", peer: str = "torch") -> str:
    if not results:
        return "–"
    return f"{statistics.geometric_mean([figure(r, name, peer) for r in results]):.2f}"


def _by_peer(results: list[Result]) -> Iterable[str]:
    """The speedup over each peer, if there are others than torch and the copies."""
    peers = [peer for peer in PEERS if peer not in ("copy", "clone") and any(peer in r["speedup"] for r in results)]
    if len(peers) < 2:
        return
    rows = []
    for operation, info in OPERATIONS.items():
        groups = [[r for r in results if r["operation"] == operation and peer in r["speedup"]] for peer in peers]
        pairs = zip(groups, peers, strict=True)
        if any(groups):
            rows.append((info.title, *(_mean_and_minimum(group, peer) for group, peer in pairs)))
    yield "## Speedup over each peer"
    yield "Time of the peer / time of normfused: geometric mean over the cases that the peer covers, and minimum."
    yield table(("operation", *(PEERS[peer].title for peer in peers)), rows)


def _mean_and_minimum(group: list[Result], peer: str) -> str:
    if not group:
        return "–"
    return f"{_mean(group, 'speedup', peer)} ({min(figure(r, 'speedup', peer) for r in group):.2f})"


def _by_cache(results: list[Result]) -> Iterable[str]:
    """The distance to a copy by the cache that the tensors fit, if the results say which."""
    levels = [level for level in ("L2", "L3", "L4", "memory") if any(r.get("fits") == level for r in results)]
    if not levels:
        return
    rows = []
    for operation, info in OPERATIONS.items():
        groups = [[r for r in results if r["operation"] == operation and r.get("fits") == level] for level in levels]
        if any(groups):
            rows.append((info.title, *(f"{_mean(group, 'resident')} ({len(group)})" for group in groups)))
    yield "## Distance to a copy"
    yield (
        "Time of normfused / time of copying the bytes of moving each tensor once, in the same rounds. Geometric means "
        "by the smallest cache that holds an input and an output, and numbers of cases. L2 is that of one core; the "
        "system reports the sizes."
    )
    yield table(("operation", *levels), rows)


def _slower(results: list[Result]) -> str:
    slower = sorted((r for r in results if figure(r, "speedup") < 1), key=lambda r: figure(r, "speedup"))
    if not slower:
        return "No case is slower than torch."
    rows = [(OPERATIONS[r["operation"]].title, _case(r), f"{figure(r, 'speedup'):.2f}", _quartiles(r)) for r in slower]
    return table(("operation", "case", "speedup", "quartiles"), rows, text_columns=2)


def _slower_than_onednn(results: list[Result]) -> Iterable[str]:
    """The cases in which oneDNN is faster, with the time that moving the least bytes takes in their layout."""
    cases = [r for r in results if "onednn" in r["speedup"] and figure(r, "speedup", "onednn") < 1]
    if not cases:
        return
    rows = []
    for result in cases:
        # Rows of channels_last have values of all channels: the statistics are known only after the last row.
        traffic: Traffic = "streaming" if result["layout"] == "channels_last" else "resident"
        ours, theirs = (result["seconds"][peer]["median"] for peer in ("normfused", "onednn"))
        least = ours / figure(result, traffic)
        milliseconds = [f"{seconds * 1e3:.3g}" for seconds in (ours, theirs, least)]
        bound = "**above oneDNN's**" if theirs < least <= ours else ""  # beyond the copy's speed it is no bound
        speedup = f"{figure(result, 'speedup', 'onednn'):.2f}"
        rows.append((OPERATIONS[result["operation"]].title, _case(result), speedup, *milliseconds, bound))
    yield "## Slower than oneDNN"
    yield (
        "*Least ms*: the time of a copy of the bytes that must be moved in this layout, in NCHW each tensor once, in "
        "channels_last once for the statistics and once more for the output. oneDNN has blocks of 8 or 16 channels, "
        "whose statistics are known while the block is in the cache. The time of a call in Python and autograd, in "
        "which oneDNN has no part, is not counted."
    )
    yield table(("operation", "case", "speedup", "normfused ms", "oneDNN ms", "least ms", ""), rows, text_columns=2)


def _quartiles(result: Result) -> str:
    speedup = result["speedup"]["torch"]
    return f"{speedup['q1']:.2f}–{speedup['q3']:.2f}"


def _details(results: list[Result]) -> Iterable[str]:
    """For each operation a heading and the table of its cases."""
    for operation, info in OPERATIONS.items():
        group = [r for r in results if r["operation"] == operation]
        if not group:
            continue
        peers = [peer for peer in PEERS if any(peer in r["seconds"] for r in group)]
        # Keyed by title: one column if both counts are equal.
        floors: dict[str, Traffic] = {_counts(info.streaming): "streaming", _counts(info.resident): "resident"}
        if "planned" in group[0]["floor_distance"]:
            floors["planned bytes"] = "planned"
        header = [
            *("shape", "dtype", "layout", "normfused ms"),
            *(f"{PEERS[peer].title} ms" for peer in peers),
            *("speedup", "quartiles", *(f"% of copy speed, {counts}" for counts in floors)),
            *(["oneDNN's layout and kernel"] if "onednn" in peers else []),
        ]
        yield f"## {info.title}"
        yield table(header, (_row(result, peers, floors.values()) for result in group), text_columns=3)


def _counts(traffic: tuple[int, int]) -> str:
    return "{}R + {}W".format(*traffic)


def _row(result: Result, peers: list[str], floors: Iterable[Traffic]) -> list[str]:
    return [
        "×".join(map(str, result["shape"])),
        result["dtype"],
        result["layout"],
        *(_milliseconds(result, peer) for peer in ("normfused", *peers)),
        f"{figure(result, 'speedup'):.2f}",
        _quartiles(result),
        *(f"{1 / figure(result, floor):.0%}" for floor in floors),
        *([result["notes"].get("onednn", "–")] if "onednn" in peers else []),
    ]


def _milliseconds(result: Result, peer: str) -> str:
    return f"{result['seconds'][peer]['median'] * 1e3:.3g}" if peer in result["seconds"] else "–"


def _case(result: Result) -> str:
    n, channels, side, _ = result["shape"]
    return f"{n}×{channels}×{side}², {result['dtype']}, {result['layout']}"
