"""Memory and time of one causal self-attention layer, forward and backward, against its length.

The setting of the paper's first figure (Gupta et al. 2021): batch 1, 12 heads of size 64, float32. Each point has a
process of its own. Before it is measured, its output and all its gradients are compared at a short length with a
dense computation in float64.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import choose_backend
from ..functional import RelativeBias, topk_attention
from ..functional.checks import check_dropout, check_k
from ..nn import TopKAttention
from .checks import check_at_least
from .memory import PeakMeter, limit_memory
from .plots import draw_memory_and_time
from .records import Json, append_json_line, environment, read_json_lines
from .timing import Stopwatch, busy_note
from .workers import Send, WorkerError, run_in_fresh_process

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/attention-layer/1"
DEFAULT_OUT = Path("results/attention")
DEFAULT_LENGTHS = (2048, 8192, 16384, 32768)
IMPLEMENTATIONS = {
    "topk": "top-k attention",
    "query-chunks": "query chunks, every key",
    "sdpa": "PyTorch's scaled_dot_product_attention",
}
BIASES = ("none", "learned")

# Gupta et al. 2021, attention layer, GiB, read off the figure (about +-0.02); dropout 0.1, query chunks of 1,024.
PAPER_GIB = {
    "topk": {2048: 0.24, 4096: 0.58, 6144: 0.75, 8192: 0.98, 10240: 1.17, 16384: 2.63, 32768: 5.15, 61440: 9.63},
    "query-chunks": {
        2048: 0.86,
        4096: 1.69,
        6144: 2.54,
        8192: 3.37,
        10240: 4.31,
        16384: 6.90,
        32768: 14.52,
        61440: 28.62,
    },
    "sdpa": {2048: 1.07, 4096: 4.82, 6144: 10.74, 8192: 19.02, 10240: 29.65},  # the paper's vanilla attention
}

# Long enough that k leaves most keys out, short enough that the check costs nothing.
_CHECK_LENGTH = 192
_CHECK_K = 24
# Rows whose k-th and next score are closer than this may choose either key in float32, and are left out of the check.
_NEAR_TIE = 1e-5
_CHECK_TOLERANCE = 1e-4
# Of what is free when a point starts. Beyond it the point is out of memory, before others on the machine suffer.
_MEMORY_FRACTION = 0.9
_LINES = "attention.jsonl"
_PICTURE = "attention.png"
# A number from another processor or another PyTorch is no reason to skip a point.
_SAME_ENVIRONMENT = ("topk_attention", "torch", "cpu")


class CheckFailedError(ValueError):
    """A layer does not compute what it should."""


@dataclass(frozen=True)
class Point:
    """One measurement. `k` counts for implementation "topk" alone.

    projections  four square linear layers around the attention; without them its inputs are query, key and value
    bias         "learned": one number per head and distance, trained with the rest
    """

    implementation: str
    length: int
    k: int = 128
    num_heads: int = 12
    head_dim: int = 64
    bias: str = "none"
    dropout_p: float = 0.0
    projections: bool = True
    backend: str = "auto"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            names = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementations must be among {names}, got {self.implementation!r}")
        if self.bias not in BIASES:
            raise ValueError(f'bias must be "none" or "learned", got {self.bias!r}')
        check_k("k", self.k)
        check_dropout(self.dropout_p)
        check_at_least(1, self, "length", "num_heads", "head_dim", "threads")
        choose_backend(self.backend)

    def as_record(self) -> Json:
        """What tells this point from others: without settings that its implementation does not look at."""
        record = asdict(self)
        if self.implementation != "topk":
            record["k"] = None
        record["backend"] = None if self.implementation == "sdpa" else choose_backend(self.backend).name
        return record


@dataclass(frozen=True)
class AttentionBenchmark:
    """Which points to measure and how.

    repetitions    timed steps of a point; fewer where they would take longer than `enough_s` together
    time_limit_s   a point that is not done by then is recorded as such
    """

    points: Sequence[Point]
    out: Path = DEFAULT_OUT
    repetitions: int = 3
    enough_s: float = 240.0
    time_limit_s: float = 900.0
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions")
        if not self.points:
            raise ValueError("there is no point to measure: give at least one length and one implementation")


def grid(lengths: Iterable[int], implementations: Iterable[str], **settings: object) -> list[Point]:
    """One point for each length and implementation, shortest first.

    >>> [(point.length, point.implementation) for point in grid([512, 1024], ["topk"])]
    [(512, 'topk'), (1024, 'topk')]
    """
    pairs = itertools.product(sorted(set(lengths)), dict.fromkeys(implementations))
    return [Point(implementation, length, **settings) for length, implementation in pairs]  # type: ignore[arg-type]


def bias_and_dropout(**settings: object) -> list[Point]:
    """The two settings in which PyTorch's attention on a CPU falls back to an L x L path: L = 8,192, 4 heads, the
    attention alone without projections."""
    base = Point("topk", 8192, num_heads=4, projections=False, **settings)  # type: ignore[arg-type]
    variants = (replace(base, bias="learned"), replace(base, dropout_p=0.1))
    return [replace(point, implementation=name) for point in variants for name in ("topk", "sdpa")]


def run_attention_benchmark(benchmark: AttentionBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not there yet, append each to `attention.jsonl` as it finishes, and show them.

    Returns the records of all points asked for, in their order. A point that ran out of memory or time is one of them.

    Raises:
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    from rich.text import Text

    lines = benchmark.out / _LINES
    before = [] if benchmark.fresh else read_json_lines(lines)
    here = environment()
    records = []
    for number, point in enumerate(benchmark.points, 1):
        record = _find(before, point, here, benchmark.time_limit_s)
        told = f"[{number}/{len(benchmark.points)}] {_label(point)}"
        if record is not None:
            made = record["environment"]
            _say(console, f"{told}: {_in_words(record)} (there already, of {made['date']}, commit {made['commit']})")
        else:
            with console.status(Text(f"{told} ...")):
                record = _measure(benchmark, point)
            append_json_line(lines, record)
            _say(console, f"{told}: {_in_words(record)}")
        records.append(record)
    _show(records, benchmark.points, console)
    picture = _draw(benchmark, here, records)
    if picture is not None:
        _say(console, f"Picture: {picture}")
    _say(console, f"Records: {lines}")
    return records


def measure_point(request: Json, send: Send) -> Json:
    """One point, in a process of its own."""
    point = Point(**request["point"])
    torch.set_num_threads(point.threads)
    torch.manual_seed(point.seed)
    limit_memory(_MEMORY_FRACTION)
    largest_error = check(point)  # also the warm-up, at a tiny length
    other_cores: list[float] = []

    def step(layer: nn.Module, inputs: tuple[Tensor, ...], output_gradient: Tensor) -> float:
        for tensor in (*inputs, *layer.parameters()):
            tensor.grad = None
        with Stopwatch() as stopwatch:
            layer(*inputs).backward(output_gradient)
        other_cores.extend([] if stopwatch.other_cores is None else [stopwatch.other_cores])
        return stopwatch.elapsed_s

    with PeakMeter() as first_meter:
        # Made inside: weights, input and all gradients count.
        layer, inputs = new_layer(point), new_inputs(point)
        output_gradient = torch.randn(output_shape(point))
        times = [step(layer, inputs, output_gradient)]
    send({"step": 1})
    with PeakMeter() as later_meter:
        while len(times) < request["repetitions"] and sum(times) + times[-1] < request["enough_s"]:
            times.append(step(layer, inputs, output_gradient))
            send({"step": len(times)})
    memory, later_memory = first_meter.read(), later_meter.read()
    return {
        "elapsed_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "repetitions": len(times),
        "other_cores": max(other_cores, default=None),
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        # Memory that the allocator keeps between steps is in this one.
        "peak_of_later_steps_mib": later_memory.total_peak_mib - memory.baseline_mib,
        "memory_method": memory.method,
        "largest_error_in_check": largest_error,
    }


def new_layer(point: Point) -> nn.Module:
    """The layer of a point, with random weights.

    It takes x [1, L, H * D] with projections, and query, key and value [1, H, L, D] without.
    """
    if not point.projections:
        return _BareAttention(point)
    width = point.num_heads * point.head_dim
    projections = [nn.Linear(width, width) for _ in range(4)]
    if point.implementation == "sdpa":
        return _DenseLayer(point, projections)
    return _TopKLayer(point, projections)


def new_inputs(point: Point) -> tuple[Tensor, ...]:
    """Random inputs of a point's layer that want a gradient."""
    if point.projections:
        return (torch.randn(output_shape(point)).requires_grad_(),)
    return tuple(torch.randn(output_shape(point)).requires_grad_() for _ in range(3))


def output_shape(point: Point) -> tuple[int, ...]:
    """[1, L, H * D] with projections, [1, H, L, D] without; the input has the same."""
    if point.projections:
        return (1, point.length, point.num_heads * point.head_dim)
    return (1, point.num_heads, point.length, point.head_dim)


def check(point: Point) -> float:
    """Compare a point's layer at a short length, in float32 and without dropout, with a dense computation in float64.

    Returns the largest difference in the output and in any gradient, as a fraction of that tensor's largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    small = replace(point, length=min(point.length, _CHECK_LENGTH), k=min(point.k, _CHECK_K), dropout_p=0.0)
    layer, inputs = new_layer(small), new_inputs(small)
    named = {f"input {number}": tensor for number, tensor in enumerate(inputs)} | dict(layer.named_parameters())
    dense = {name: tensor.detach().double().requires_grad_() for name, tensor in named.items()}
    expected, is_clear = _dense_attention(small, dense)
    output_gradient = torch.randn(expected.shape, dtype=torch.float64) * is_clear
    output = layer(*inputs)
    output.backward(output_gradient.float())
    expected.backward(output_gradient)
    results = {"output": (output * is_clear, expected * is_clear)}
    for name, tensor in named.items():
        if tensor.grad is None:
            raise CheckFailedError(f"{_label(small)}: {name} got no gradient")
        results[f"gradient of {name}"] = (tensor.grad, cast(Tensor, dense[name].grad))
    # Some gradients are zero but for rounding (that of the key projection's bias): those are held against the others.
    floor = 0.1 * max(truth.abs().max().item() for _, truth in results.values())
    errors = {
        name: (result - truth).abs().max().item() / max(truth.abs().max().item(), floor)
        for name, (result, truth) in results.items()
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else torch.inf)
    if not errors[worst] <= _CHECK_TOLERANCE:
        raise CheckFailedError(
            f"{_label(small)}: the {worst} differs from a dense computation by {errors[worst]:.1e} of its largest entry"
        )
    return errors[worst]


class _TopKLayer(nn.Module):
    """The library's layer, with its bias table."""

    def __init__(self, point: Point, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.attention = TopKAttention(
            *projections,
            num_heads=point.num_heads,
            k=_k(point),
            is_causal=True,
            dropout_p=point.dropout_p,
            backend=point.backend,
        )
        self.bias_table = _new_bias_table(point)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, bias=_relative_bias(self.bias_table))


class _DenseLayer(nn.Module):
    """The same layer around PyTorch's attention."""

    def __init__(self, point: Point, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.query_projection, self.key_projection, self.value_projection, self.output_projection = projections
        self.point = point
        self.bias_table = _new_bias_table(point)

    def forward(self, x: Tensor) -> Tensor:
        query = _heads(self.query_projection(x), self.point.num_heads)
        key = _heads(self.key_projection(x), self.point.num_heads)
        value = _heads(self.value_projection(x), self.point.num_heads)
        output = _sdpa(self.point, query, key, value, self.bias_table)
        return self.output_projection(output.transpose(1, 2).flatten(2))


class _BareAttention(nn.Module):
    """Attention alone."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.point = point
        self.bias_table = _new_bias_table(point)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.point.implementation == "sdpa":
            return _sdpa(self.point, query, key, value, self.bias_table)
        return topk_attention(
            query,
            key,
            value,
            k=_k(self.point),
            bias=_relative_bias(self.bias_table),
            is_causal=True,
            dropout_p=self.point.dropout_p,
            backend=self.point.backend,
        )


def _k(point: Point) -> int | None:
    return point.k if point.implementation == "topk" else None


def _new_bias_table(point: Point) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(point.num_heads, 2 * point.length - 1)) if point.bias == "learned" else None


def _relative_bias(table: Tensor | None) -> RelativeBias | None:
    return None if table is None else RelativeBias(table)


def _heads(projected: Tensor, num_heads: int) -> Tensor:
    """[1, L, H * D] -> [1, H, L, D]"""
    return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _sdpa(point: Point, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=point.dropout_p, is_causal=True)
    # Of the ways to write the table out, windows of it cost least: an index_select would hold an L x L index as well.
    mask = table.unfold(1, point.length, 1).flip(1)  # [H, L, L]
    mask.masked_fill_(_future(point.length), -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], dropout_p=point.dropout_p)


def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu_(1)


def _dense_attention(point: Point, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The layer written out with all scores, from tensors named as in `check`.

    Returns the output, and 1 for rows of it that hang on no near-tie, otherwise 0.
    """

    def project(name: str, x: Tensor) -> Tensor:
        weight, bias = (
            next(tensor for full_name, tensor in tensors.items() if full_name.endswith(f"{name}_projection.{part}"))
            for part in ("weight", "bias")
        )
        return x @ weight.T + bias

    if point.projections:
        x = tensors["input 0"]
        query, key, value = (_heads(project(name, x), point.num_heads) for name in ("query", "key", "value"))
    else:
        query, key, value = (tensors[f"input {number}"] for number in range(3))
    scores = query @ key.mT / point.head_dim**0.5  # [1, H, L, L]
    if "bias_table" in tensors:
        position = torch.arange(point.length)
        scores = scores + tensors["bias_table"][:, position - position[:, None] + point.length - 1]
    scores = scores.masked_fill(_future(point.length), -torch.inf)
    is_clear = torch.ones(scores.shape[:3], dtype=torch.bool)  # [1, H, L]
    k = _k(point)
    if k is not None and k < point.length:
        best, order = scores.detach().sort(dim=-1, descending=True, stable=True)
        is_clear = ~(best[..., k - 1] - best[..., k] < _NEAR_TIE)  # -inf - -inf is NaN: no key to mistake
        scores = scores.masked_fill(
            torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], False), -torch.inf
        )
    output = scores.softmax(-1) @ value
    if not point.projections:
        return output, is_clear[..., None]
    return project("output", output.transpose(1, 2).flatten(2)), is_clear.all(1)[..., None]


def _measure(benchmark: AttentionBenchmark, point: Point) -> Json:
    record: Json = {"schema": SCHEMA, "point": point.as_record(), "environment": environment()}
    request = {"point": asdict(point), "repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}
    try:
        result = run_in_fresh_process(f"{__name__}:measure_point", request, time_limit_s=benchmark.time_limit_s)
    except WorkerError as error:
        if error.outcome not in ("out of memory", "time limit"):
            raise WorkerError(error.outcome, f"{_label(point)} failed ({error.outcome}): {error}") from error
        return record | {"outcome": error.outcome, "message": str(error), "time_limit_s": benchmark.time_limit_s}
    return record | {"outcome": "finished"} | result


def _find(records: Sequence[Json], point: Point, here: Json, time_limit_s: float) -> Json | None:
    """The newest record of this point that was made with this software on this processor."""
    for record in reversed(records):
        if record.get("point") != point.as_record() or not _same_environment(record, here):
            continue
        # A point that was given up gets another chance with more time.
        if record["outcome"] != "time limit" or record["time_limit_s"] >= time_limit_s:
            return record
    return None


def _label(point: Point) -> str:
    parts = [
        f"L = {point.length:,}",
        point.implementation + (f" k = {point.k}" if point.implementation == "topk" else ""),
    ]
    if point.bias != "none":
        parts.append("learned bias")
    if point.dropout_p:
        parts.append(f"dropout {point.dropout_p:g}")
    return ", ".join(parts)


def _in_words(record: Json) -> str:
    if record["outcome"] != "finished":
        return f"{record['outcome']} ({record['message'].splitlines()[0]})"
    return f"{record['peak_mib'] / 1024:.2f} GiB, {record['elapsed_s']:.2f} s"


def _show(records: Sequence[Json], points: Sequence[Point], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="One self-attention layer, forward and backward", title_justify="left")
    table.add_column("L", justify="right")
    table.add_column("implementation")
    for heading in ("memory [GiB]", "paper [GiB], quoted", "time [s]", "fastest to slowest [s]"):
        table.add_column(escape(heading), justify="right")
    for point, record in zip(points, records, strict=True):
        quoted = _paper_gib(point)
        name = _label(point).partition(", ")[2]
        shown_quote = "" if quoted is None else f"{quoted:.2f}"
        if record["outcome"] == "finished":
            spread = f"{record['fastest_s']:.2f} to {record['slowest_s']:.2f} (of {record['repetitions']})"
            cells = (f"{record['peak_mib'] / 1024:.2f}", shown_quote, f"{record['elapsed_s']:.2f}", spread)
        else:
            cells = (record["outcome"], shown_quote, "", "")
        table.add_row(f"{point.length:,}", name, *cells)
    console.print(table)
    _say(
        console,
        "Memory is the peak of the first step above what the process held before the layer was made; time: median.",
    )
    note = busy_note([record.get("other_cores") for record in records], records[0]["environment"]["num_cpus"])
    if note is not None:
        _say(console, note)
    if any(_paper_gib(point) is not None for point in points):
        _say(
            console,
            "Quoted: Gupta et al. 2021, read off the figure, on a GPU and with dropout 0.1; beside sdpa stands its "
            "vanilla attention.",
        )


def _paper_gib(point: Point) -> float | None:
    if (point.num_heads, point.head_dim, point.bias, point.projections) != (12, 64, "none", True):
        return None
    if point.implementation == "topk" and point.k != 128:
        return None
    return PAPER_GIB[point.implementation].get(point.length)


def _draw(benchmark: AttentionBenchmark, here: Json, records: Sequence[Json]) -> Path | None:
    """Draw all points on file that differ from those asked for in length and implementation alone."""
    settings = {_settings(record["point"]) for record in records}
    lengths = {record["point"]["length"] for record in records}
    if len(settings) > 1 or len(lengths) < 2 or all(record["outcome"] != "finished" for record in records):
        return None
    curves: dict[str, dict[int, Json]] = {}
    for record in [*read_json_lines(benchmark.out / _LINES), *records]:
        point = record["point"]
        if _settings(point) not in settings or not _same_environment(record, here):
            continue
        curves.setdefault(_curve_name(point), {})[point["length"]] = record | {"length": point["length"]}
    point = benchmark.points[0]
    topk = [point for point in benchmark.points if point.implementation == "topk"]
    quoted = {"peak_mib": {"top-k, Gupta et al. 2021 (quoted, GPU)": PAPER_GIB["topk"]}}
    draw_memory_and_time(
        {name: list(by_length.values()) for name, by_length in sorted(curves.items(), reverse=True)},
        benchmark.out / _PICTURE,
        x="length",
        x_label="L, length of the sequence",
        title=f"One causal self-attention layer, {point.num_heads} heads of {point.head_dim}, float32, "
        f"{point.threads} CPU threads",
        quoted=quoted if topk and _paper_gib(replace(topk[0], length=2048)) is not None else None,
    )
    return benchmark.out / _PICTURE


def _settings(point: Json) -> tuple[object, ...]:
    return tuple(point[name] for name in ("num_heads", "head_dim", "bias", "dropout_p", "projections", "threads"))


def _curve_name(point: Json) -> str:
    match point["implementation"]:
        case "topk":
            return f"top-k, k = {point['k']} ({point['backend']})"
        case "query-chunks":
            return f"every key, in query chunks ({point['backend']})"
    return "PyTorch's scaled_dot_product_attention"


def _same_environment(record: Json, here: Json) -> bool:
    there = record.get("environment", {})
    return all(there.get(name) == here[name] for name in _SAME_ENVIRONMENT)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
