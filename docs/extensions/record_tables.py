"""Tables of the site that are made from the records in results/ whenever the site is built."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results"
Record = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def markdown(name: str) -> str:
    """The table of this name as Markdown.

    Raises:
        ValueError: there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
    header, rows = TABLES[name]()
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def attention_speed() -> Table:
    """The attention operation against PyTorch's."""
    rows = []
    peaks = _peaks("attention-kernel/table.jsonl")
    for record in _timings("attention-kernel/table.jsonl"):
        work = record["request"]["work"]
        forward, both = _ratios(record["methods"], "sdpa", "topk-cpu")
        bias = {"none": "", "learned": ", learned relative bias"}[work["bias"]]
        extra = ", causal" * work["is_causal"] + bias
        extra += f", dropout {work['dropout_p']:g}" * (work["dropout_p"] > 0)
        extra += f", D = {work['head_dim']}" * (work.get("head_dim", 64) != 64)
        extra += f", {work.get('dtype', 'float32')}" * (work.get("dtype", "float32") != "float32")
        label = f"H = {work['num_heads']}, L = {work['length']:,}, k = {work['k']}{extra}"
        ours, theirs = (_mib(peaks[_subject(work, method)]) for method in ("topk-cpu", "sdpa"))
        rows.append([label, f"{forward:.1f}", f"{both:.1f}", ours, theirs])
    return ["work", "forward", "forward + backward", "peak memory, top-k", "peak memory, PyTorch"], rows


def feed_forward_speed() -> Table:
    """The feed-forward operation against the dense layer."""
    rows = []
    peaks = _peaks("feed-forward-kernel/table.jsonl")
    for record in _timings("feed-forward-kernel/table.jsonl"):
        work = record["request"]["work"]
        forward, both = _ratios(record["methods"], "dense", "topk-cpu")
        ours, theirs = (peaks[_subject(work, method)] for method in ("topk-cpu", "dense"))
        row = [
            f"{work['d_model']:,}",
            f"{work['d_ff']:,}" + " gated" * work["is_gated"],
            f"{work['k']}",
            f"{work['tokens']:,}",
            f"{forward:.2f}",
            f"{both:.2f}",
            f"{_mib(ours)} of {_mib(theirs)}",
        ]
        rows.append(row)
    header = ["d_model", "d_ff", "k", "tokens", "forward", "forward + backward", "peak memory, top-k of dense"]
    return header, rows


def attention_layer() -> Table:
    """One attention layer against its length: memory and time of each method."""
    names = {
        ("topk", "cpu"): "top-k (cpu)",
        ("sdpa", None): "PyTorch's flash attention",
        ("query-chunks", "chunked"): "every key, in query chunks",
        ("vanilla", None): "vanilla",
        ("vanilla-chunks", None): "vanilla, 1,024 queries at a time",
        ("performer", None): "Performer",
        ("rfa", None): "RFA",
    }
    cells: dict[tuple[int, str], str] = {}
    for record in _lines("attention/attention.jsonl"):
        point = record["point"]
        name = names.get((point["implementation"], point["backend"]))
        if name is None or point["k"] not in (None, 128):
            continue
        finished = record["outcome"] == "finished"
        text = f"{record['peak_mib'] / 1024:.2f} / {record['elapsed_s']:.2g}" if finished else record["outcome"]
        cells[point["length"], name] = text
    lengths = sorted({length for length, _ in cells})
    columns = [name for name in names.values() if any(name == column for _, column in cells)]
    return ["L", *columns], [
        [f"{length:,}", *(cells.get((length, column), "not tried") for column in columns)] for length in lengths
    ]


def pretrained() -> Table:
    """SmolLM2 on a text, the same k for every head: medians over rounds."""
    record = _json("demo/demo.json")
    settings: dict[tuple[int, bool], list[Record]] = {}
    for run in record["runs"]:  # a setting runs once a round; records of old have no completed runs
        settings.setdefault((run["k"] or 0, run.get("completed", False)), []).append(run)
    rows = []
    for (k, completed), runs in sorted(settings.items()):
        perplexity, time, memory = (
            statistics.median(run[field] for run in runs) for field in ("perplexity", "elapsed_s", "peak_mib")
        )
        name = f"k = {k}" + ", completed" * completed if k else "full attention"
        rows.append([name, f"{perplexity:.2f}", f"{time:.1f}", f"{memory:.0f}"])
    return ["attention", "perplexity", "time [s]", "peak memory above the model [MiB]"], rows


def calibration() -> Table:
    """Perplexity with one k for every head and with a k for each."""
    texts = {
        "smollm2-moby-dick": "Moby-Dick, 4,096 tokens",
        "smollm2-python": "Python's documentation, 4,096 tokens",
        "smollm2-8192": "Moby-Dick, 8,192 tokens",
    }
    means = (32, 64, 128)
    rows = []
    for name, text in texts.items():
        found = _perplexities(name)
        for kind, label in (("uniform", "the same k for every head"), ("calibrated", "a k for each head")):
            rows.append([text, found["full", None], label, *(found.get((kind, mean), "") for mean in means)])
    return ["text", "full attention", "keys", *(f"mean k = {mean}" for mean in means)], rows


def completion() -> Table:
    """Perplexity of top-k attention alone and completed."""
    pairs = []  # of what is alone and what is completed, for each length of text
    for alone_in, completed_in in (
        (("smollm2-small-k", "smollm2-moby-dick"), "smollm2-completed"),
        (("smollm2-8192",), "smollm2-8192-completed"),
    ):
        alone: dict[tuple[str, float | None], str] = {}
        for name in alone_in:
            alone |= _perplexities(name)
        pairs += [alone, _perplexities(completed_in)]
    labels = {
        ("full", None): "all (full attention)",
        ("uniform", 64): "k = 64 for every head",
        ("uniform", 16): "k = 16 for every head",
        ("calibrated", 64): "calibrated, mean k = 64",
        ("calibrated", 32): "calibrated, mean k = 32",
    }
    rows = [[label, *(found.get(setting, "") for found in pairs)] for setting, label in labels.items()]
    header = ["keys", "top-k alone", "completed", "8,192 tokens: top-k alone", "8,192 tokens: completed"]
    return header, rows


def calibration_feed_forward() -> Table:
    """Perplexity on 2,048 tokens with a part of the keys, of the neurons, or of both."""
    rows = []
    for run in _json("calibration/smollm2-feed-forward.record.json")["runs"]:
        keys = "all" if run["mean_k"] is None else f"{run['mean_k']:.0f}"
        neurons = "all" if run["feed_forward_mean_k"] is None else f"{run['feed_forward_mean_k']:.0f} of 1,536"
        kind = {"full": "", "uniform": "the same everywhere", "calibrated": "calibrated"}[run["kind"]]
        rows.append([keys, neurons, kind, f"{run['perplexity']:.2f}"])
    return ["mean k, keys", "mean k, neurons", "how they are shared out", "perplexity"], rows


def sentence_embeddings() -> Table:
    """How far MiniLM's sentence embeddings move."""
    rows = [
        [
            "all" if run["mean_k"] is None else f"{run['mean_k']:.0f} of 512",
            {"full": "", "uniform": "the same everywhere", "calibrated": "calibrated"}[run["kind"]],
            f"{run['hidden_error']:.3f}",
            f"{run['cosine']:.3f}",
        ]
        for run in _json("calibration/minilm-moby-dick.record.json")["runs"]
    ]
    return ["mean k, keys", "how they are shared out", "relative error of hidden states", "cosine of embeddings"], rows


def language_model() -> Table:
    """A small GPT trained from scratch."""
    arms = _json("language-model/input-bytes.json")["arms"]
    return ["trained with", "nats a byte", "perplexity of a byte"], [
        [arm["name"], f"{arm['validation_loss']:.3f}", f"{arm['perplexity']:.2f}"] for arm in arms
    ]


def feed_forward_curve() -> Table:
    """A small language model with dense and with top-k feed-forward layers."""
    arms = _json("feed-forward-curve/feed-forward-curve.json")["arms"]
    return ["neurons per token", "validation loss [nats per byte]"], [
        ["all" if arm["k"] is None else f"{arm['k']}", f"{arm['curve'][-1]['validation_loss']:.3f}"] for arm in arms
    ]


def stand_ins() -> Table:
    """Stand-ins for the neurons that are not kept."""
    record = _json("stand-ins/stand-ins.json")
    alone = {run["k"]: run for run in record["runs"] if run["rank"] is None}
    rows = []
    for k in (None, *record["config"]["k"]):
        row = ["all" if k is None else f"{k}", f"{alone[k]['perplexity']:.2f}"]
        for rank in record["config"]["ranks"]:
            run = next((run for run in record["runs"] if (run["k"], run["rank"]) == (k, rank)), None)
            row.append("" if run is None else f"{run['perplexity']:.2f}")
        rows.append(row)
    names = ["constant" if rank == 0 else f"rank {rank}" for rank in record["config"]["ranks"]]
    return ["neurons per token", "left out", *names], rows


def wheel_environments() -> Table:
    """Where the wheel, and the source, were installed and tried."""
    header = ["installed", "Python", "torch", "transformers", "system", "kernels", "compared with the reference"]
    rows = []
    for record in _lines("wheel/environments.jsonl"):
        installed = record["installed"]
        if "bytes" in record:
            tag = record["wheel"].split("-")[-1].removesuffix(".whl").split(".")[0]
            installed = f"{tag}, {record['bytes'] / 1e6:.1f} MB"
        if "warning" in record:
            rows.append([installed, record["python"], record["torch"], "", "", "none, warned at import", ""])
            continue
        calls = record["attention_calls"] + record["feed_forward_calls"]
        result = f"{calls} calls, {len(record['targets'])} targets"
        of_system = [record.get("transformers", ""), record["system"], record["targets"][0]]
        rows.append([installed, record["python"], record["torch"], *of_system, result])
    return header, rows


TABLES: dict[str, Callable[[], Table]] = {
    "attention-layer": attention_layer,
    "attention-speed": attention_speed,
    "calibration": calibration,
    "calibration-feed-forward": calibration_feed_forward,
    "completion": completion,
    "feed-forward-curve": feed_forward_curve,
    "feed-forward-speed": feed_forward_speed,
    "language-model": language_model,
    "pretrained": pretrained,
    "sentence-embeddings": sentence_embeddings,
    "stand-ins": stand_ins,
    "wheel-environments": wheel_environments,
}


def _perplexities(name: str) -> dict[tuple[str, float | None], str]:
    """Of the runs of a calibration, by their kind and mean k."""
    runs = _json(f"calibration/{name}.record.json")["runs"]
    return {(run["kind"], run["mean_k"]): f"{run['perplexity']:.2f}" for run in runs}


def _json(name: str) -> Record:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _lines(name: str) -> list[Record]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def _key(work: Record) -> str:
    return json.dumps(work, sort_keys=True)


def _timings(name: str) -> list[Record]:
    """The last timing of each work, in the order of the file."""
    records = [record for record in _lines(name) if record["measured"] == "time_methods"]
    return list({_key(record["request"]["work"]): record for record in records}.values())


def _subject(work: Record, method: str) -> tuple[str, str]:
    """What the peak of a method was recorded for: only top-k methods have a k of their own."""
    return _key(work if method.startswith("topk") else work | {"k": 1}), method


def _peaks(name: str) -> dict[tuple[str, str], float]:
    """Peak memory in MiB of each work and method."""
    return {
        (_key(record["request"]["work"]), record["request"]["method"]): record["peak_mib"]
        for record in _lines(name)
        if record["measured"] == "measure_memory" and record["outcome"] == "finished"
    }


def _ratios(methods: Record, slow: str, fast: str) -> tuple[float, float]:
    """How many times as fast, forward and forward with backward, by the medians."""
    forward, both = (
        methods[slow][part]["median_s"] / methods[fast][part]["median_s"] for part in ("forward", "forward_backward")
    )
    return forward, both


def _mib(value: float) -> str:
    return f"{value:.1f} MiB" if value < 1024 else f"{value / 1024:.1f} GiB"
