"""Tables and pictures from results. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...runs.records import Json, write_whole
from ...runs.timing import busy_note
from ...runs.turns import MODES
from ...show.plots import draw_memory_and_time
from .benchmark import KernelBenchmark, Result

if TYPE_CHECKING:
    from rich.console import Console

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
    if benchmark.name not in benchmark.subject.sweeps or len(results) < 2:
        return [page]
    picture = benchmark.out / f"{benchmark.name}.png"
    _draw(benchmark, results, picture)
    return [page, picture]


def as_markdown(benchmark: KernelBenchmark, results: Sequence[Result]) -> str:
    """All works in one page: a heading, a table and lines below it for each."""
    here = results[0].time["environment"]
    lines = [
        f"{here['cpu']}, {benchmark.threads} threads, float32, PyTorch {here['torch']}, {here['date'][:10]}, commit "
        f"{here['commit']}.",
        "",
        *notes(benchmark, results),
    ]
    headings = _headings(benchmark)
    for result in results:
        lines += ["", f"**{result.work}**", "", _row(headings), _row(["---"] * len(headings))]
        lines += [_row(row) for row in rows(benchmark, result)]
        lines += ["", *(f"- {line}" for line in below(benchmark, result))]
    return "\n".join(lines).rstrip() + "\n"


def notes(benchmark: KernelBenchmark, results: Sequence[Result]) -> list[str]:
    """How the numbers came about."""
    rival, in_full = benchmark.subject.rival
    here = results[0].time["environment"]
    busy = busy_note([result.time.get("other_cores") for result in results], here["num_cpus"])
    return [
        "Time: median (fastest to slowest) of rounds in which all methods of a work took turns in one process. Times "
        f"{rival}: how many times as fast as {in_full}, by the medians.",
        "Peak: resident memory of the first forward and backward pass in a process of its own. "
        f"{benchmark.subject.memory_note}",
        f"Floor: {benchmark.subject.floor}.",
        *([] if busy is None else [busy]),
    ]


def rows(benchmark: KernelBenchmark, result: Result) -> list[tuple[str, ...]]:
    """One row of cells for each method that was measured, in the order of the headings."""
    table = []
    methods = benchmark.plan[result.work]
    goal = benchmark.subject.goals.get(result.work)
    for method in methods:
        if method in result.left_out:
            continue
        cells = [method]
        for mode in MODES:
            wanted = getattr(goal, mode) if goal is not None and method == methods[0] else None
            ratio = _ratio(result, benchmark.subject.rival[0], method, mode, wanted)
            cells += [_seconds(result.time_of(method), mode), ratio]
        memory, peak_mib = result.memory.get(method), result.peak_mib(method)
        cells.append(f"{peak_mib:.1f}" if peak_mib is not None else "" if memory is None else memory["outcome"])
        table.append(tuple(cells))
    return table


def below(benchmark: KernelBenchmark, result: Result) -> list[str]:
    """What else there is to say about a work: share of the floor, memory, who is missing."""
    ours = benchmark.plan[result.work][0]
    lines = []
    forward_s = result.seconds(ours, "forward")
    if forward_s is not None:
        floor_s = result.time["floor"]["median_s"]
        lines.append(f"Floor: {floor_s:.3g} s, {floor_s / forward_s:.0%} of {ours}'s forward pass.")
    lines += benchmark.subject.below(ours, result)
    lines += [f"{method} left out: {reason}." for method, reason in result.left_out.items()]
    return lines


def _headings(benchmark: KernelBenchmark) -> tuple[str, ...]:
    times = f"times {benchmark.subject.rival[0]}"
    return ("method", "forward [s]", times, "forward + backward [s]", times, "peak [MiB]")


def _seconds(times: Json, mode: str) -> str:
    if times["outcome"] != "finished":
        return times["outcome"]
    summary = times[mode]
    return f"{summary['median_s']:.3g} ({summary['fastest_s']:.3g} to {summary['slowest_s']:.3g})"


def _ratio(result: Result, rival: str, method: str, mode: str, wanted: float | None) -> str:
    seconds, rival_s = result.seconds(method, mode), result.seconds(rival, mode)
    if seconds is None or rival_s is None:
        return "" if wanted is None else f"goal {wanted:g}"
    ratio = rival_s / seconds
    if wanted is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f}, goal {wanted:g}: {'reached' if ratio >= wanted else 'missed'}"


def _show(benchmark: KernelBenchmark, results: Sequence[Result], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for result in results:
        table = Table(title=str(result.work), title_justify="left")
        for heading in _headings(benchmark):
            table.add_column(escape(heading), justify="left" if heading == "method" else "right")
        for row in rows(benchmark, result):
            table.add_row(*row)
        console.print(table)
        for line in below(benchmark, result):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in notes(benchmark, results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _draw(benchmark: KernelBenchmark, results: Sequence[Result], path: Path) -> None:
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
    subject = benchmark.subject
    draw_memory_and_time(
        curves,
        path,
        x=benchmark.name,
        x_label=subject.sweeps[benchmark.name],
        title=f"{subject.title(results[0].work, benchmark.name)}, float32, {benchmark.threads} threads",
        panels=_PANELS,
        quoted=subject.quoted.get(benchmark.name, {}),
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
