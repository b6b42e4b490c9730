"""Tables and pictures from results. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import draw_memory_and_time
from ..records import Json, write_whole
from ..timing import busy_note
from .benchmark import KernelBenchmark, Result
from .measure import MODES
from .works import GOALS

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = ("method", "forward [s]", "times sdpa", "forward + backward [s]", "times sdpa", "peak [MiB]")
NOTES = (
    "Time: median (fastest to slowest) of rounds in which all methods of a work took turns in one process. Times sdpa: "
    "how many times as fast as PyTorch's scaled_dot_product_attention, by the medians.",
    "Peak: resident memory of the first forward and backward pass in a process of its own. Inputs and the gradient of "
    "the output do not count; output, gradients of the inputs and all between do.",
    "Floor: the score product q @ k.T alone, in tiles, in the same rounds; its share of the forward pass is 100 % when "
    "selecting, softmax and values cost nothing.",
)
_PANELS = (
    ("forward_s", "Forward [s]", 1.0),
    ("forward_backward_s", "Forward and backward [s]", 1.0),
    ("peak_mib", "Peak memory of forward and backward [MiB]", 1.0),
)


def report(benchmark: KernelBenchmark, results: Sequence[Result], console: Console) -> list[Path]:
    """Show the results, write `NAME.md` and, for sweeps, `NAME.png`. Returns the files written."""
    if not results:
        return []
    _show(benchmark, results, console)
    page = benchmark.out / f"{benchmark.name}.md"
    write_whole(page, as_markdown(benchmark, results))
    sweep = {"length": "L, length of the sequence", "k": "k, keys kept per query"}
    if benchmark.name not in sweep or len(results) < 2:
        return [page]
    picture = benchmark.out / f"{benchmark.name}.png"
    _draw(benchmark, results, picture, x_label=sweep[benchmark.name])
    return [page, picture]


def as_markdown(benchmark: KernelBenchmark, results: Sequence[Result]) -> str:
    """All works in one page: a heading, a table and lines below it for each."""
    here = results[0].time["environment"]
    lines = [
        f"{here['cpu']}, {benchmark.threads} threads, float32, PyTorch {here['torch']}, {here['date'][:10]}, commit "
        f"{here['commit']}.",
        "",
        *NOTES,
        *_busy(results),
    ]
    for result in results:
        methods = benchmark.plan[result.work]
        lines += ["", f"**{result.work}**", "", _row(HEADINGS), _row(["---"] * len(HEADINGS))]
        lines += [_row(row) for row in rows(methods, result)]
        lines += ["", *(f"- {line}" for line in below(methods[0], result))]
    return "\n".join(lines).rstrip() + "\n"


def rows(methods: Sequence[str], result: Result) -> list[tuple[str, ...]]:
    """One row of cells for each method that was measured, in the order of `HEADINGS`."""
    table = []
    goal = GOALS.get(result.work)
    for method in methods:
        if method in result.left_out:
            continue
        cells = [method]
        for mode in MODES:
            wanted = getattr(goal, mode) if goal is not None and method == methods[0] else None
            cells += [_seconds(result.time_of(method), mode), _ratio(result, method, mode, wanted)]
        memory, peak_mib = result.memory.get(method), result.peak_mib(method)
        cells.append(f"{peak_mib:.1f}" if peak_mib is not None else "" if memory is None else memory["outcome"])
        table.append(tuple(cells))
    return table


def below(ours: str, result: Result) -> list[str]:
    """What else there is to say about a work: share of the floor, memory against what is allowed, who is missing."""
    lines = []
    forward_s = result.seconds(ours, "forward")
    if forward_s is not None:
        floor_s = result.time["scores"]["median_s"]
        lines.append(f"Floor: {floor_s:.3g} s, {floor_s / forward_s:.0%} of {ours}'s forward pass.")
    mine, sdpa = result.peak_mib(ours), result.peak_mib("sdpa")
    if mine is not None and sdpa is not None:
        allowed = result.work.saved_mib
        verdict = "kept" if mine - sdpa <= allowed else "exceeded"
        lines.append(
            f"Memory: {ours} needs {mine - sdpa:+.1f} MiB against sdpa; allowed are {allowed:.1f} MiB, the saved "
            f"indices and weights: {verdict}."
        )
    for method, reason in result.left_out.items():
        lines.append(f"{method} left out: {reason}.")
    return lines


def _seconds(times: Json, mode: str) -> str:
    if times["outcome"] != "finished":
        return times["outcome"]
    summary = times[mode]
    return f"{summary['median_s']:.3g} ({summary['fastest_s']:.3g} to {summary['slowest_s']:.3g})"


def _ratio(result: Result, method: str, mode: str, wanted: float | None) -> str:
    seconds, sdpa_s = result.seconds(method, mode), result.seconds("sdpa", mode)
    if seconds is None or sdpa_s is None:
        return "" if wanted is None else f"goal {wanted:g}"
    ratio = sdpa_s / seconds
    if wanted is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f}, goal {wanted:g}: {'reached' if ratio >= wanted else 'missed'}"


def _show(benchmark: KernelBenchmark, results: Sequence[Result], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for result in results:
        table = Table(title=str(result.work), title_justify="left")
        for heading in HEADINGS:
            table.add_column(escape(heading), justify="left" if heading == "method" else "right")
        methods = benchmark.plan[result.work]
        for row in rows(methods, result):
            table.add_row(*row)
        console.print(table)
        for line in below(methods[0], result):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (*NOTES, *_busy(results)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _draw(benchmark: KernelBenchmark, results: Sequence[Result], path: Path, x_label: str) -> None:
    curves: dict[str, list[Json]] = {}
    for result in results:
        for method in benchmark.plan[result.work]:
            point = {
                benchmark.name: getattr(result.work, benchmark.name),
                "forward_s": result.seconds(method, "forward"),
                "forward_backward_s": result.seconds(method, "forward_backward"),
                "peak_mib": result.peak_mib(method),
            }
            curves.setdefault(method, []).append({name: value for name, value in point.items() if value is not None})
    work = results[0].work
    fixed = f"k = {work.k}" if benchmark.name == "length" else f"L = {work.length:,}"
    draw_memory_and_time(
        curves,
        path,
        x=benchmark.name,
        x_label=x_label,
        title=f"Attention, {work.num_heads} heads of {work.head_dim}, {fixed}, float32, {benchmark.threads} threads",
        panels=_PANELS,
    )


def _busy(results: Sequence[Result]) -> list[str]:
    here = results[0].time["environment"]
    note = busy_note([result.time.get("other_cores") for result in results], here["num_cpus"])
    return [] if note is None else [note]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
