"""What to conclude from all results: sentences whose numbers come from the records. Nothing in this file measures.

A sentence whose records are missing is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .pretrained.calibration_measures import Perplexity
from .runs.ledger import is_finished
from .runs.records import Json, read_json, read_json_lines, reads


@reads()
def conclusions(results: Path) -> list[str]:
    """When top-k helps and when it does not, one sentence an entry.

    results  folder of all results
    """
    sentences: tuple[Callable[[Path], str | None], ...] = (
        _attention_speed,
        _bias_and_dropout,
        _whole_model,
        _feed_forward,
        _error_beside_random_features,
        _calibration,
        _training_from_scratch,
        _attention_memory,
    )
    return [sentence for of in sentences if (sentence := of(results)) is not None]


def _attention_speed(results: Path) -> str | None:
    found = _compared(results / "attention-kernel" / "length.jsonl", "topk-cpu", "sdpa")
    if not found:
        return None
    work, ours, theirs, _, _ = max(found, key=lambda entry: entry.work["length"])
    return (
        f"Top-k helps most where a model is trained on long inputs: at {work['length']:,} tokens and k = {work['k']} "
        f"the forward and backward pass of attention took {_seconds(ours)}, PyTorch's {_seconds(theirs)} "
        f"({theirs / ours:.1f} times as long)."
    )


def _bias_and_dropout(results: Path) -> str | None:
    found = _compared(results / "attention-kernel" / "table.jsonl", "topk-cpu", "sdpa")
    learned = [entry for entry in found if entry.work["bias"] == "learned" and not entry.work["dropout_p"]]
    dropped = [entry for entry in found if entry.work["bias"] == "none" and entry.work["dropout_p"]]
    if not learned or not dropped:
        return None
    parts = []
    for words, (_, ours, theirs, _, peaks) in (("a learned bias", learned[-1]), ("dropout", dropped[-1])):
        memory = "" if peaks is None else f" and needed {peaks[0]:,.0f} MiB against {peaks[1]:,.0f}"
        parts.append(f"with {words} it was {theirs / ours:.0f} times as fast{memory}")
    return (
        f"It helps even more where PyTorch falls back to the full score matrix: at {learned[-1].work['length']:,} "
        f"tokens {', '.join(parts)}."
    )


def _whole_model(results: Path) -> str | None:
    lines = _finished(results / "model" / "bert-base.jsonl")
    topk = [record for record in lines if record["point"]["method"] == "topk"]
    full = [record for record in lines if record["point"]["method"] in ("vanilla", "sdpa")]
    if not topk or not full:
        return None
    longest = max(topk, key=lambda record: record["point"]["length"])
    longest_full = max(record["point"]["length"] for record in full)
    if longest_full >= longest["point"]["length"]:
        return None
    return (
        f"A whole model goes much further in the same memory: a training step of bert-base reached "
        f"{longest['point']['length']:,} tokens with top-k attention and chunked feed-forward layers "
        f"({longest['peak_mib'] / 1024:.1f} GiB), but no more than {longest_full:,} tokens with transformers' own "
        "full attention."
    )


def _feed_forward(results: Path) -> str | None:
    found = _compared(results / "feed-forward-kernel" / "table.jsonl", "topk-cpu", "dense")
    if not found:
        return None
    work, ours, theirs, _, peaks = max(found, key=lambda entry: entry.work["d_ff"])
    memory = "" if peaks is None else f" and {peaks[0] / peaks[1]:.0%} of its memory"
    return (
        f"Wide feed-forward layers gain too: with k = {work['k']} of {work['d_ff']:,} neurons a forward and backward "
        f"pass took {ours / theirs:.0%} of the dense layer's time{memory}."
    )


def _error_beside_random_features(results: Path) -> str | None:
    lines = _finished(results / "attention-error" / "error.jsonl")
    if not lines:
        return None
    length = max(record["point"]["length"] for record in lines)
    at_length = [record for record in lines if record["point"]["length"] == length]
    topk = [record for record in at_length if record["point"]["method"] == "topk"]
    rivals = [record for record in at_length if record["point"]["method"] in ("performer", "performer-tuned", "rfa")]
    if not topk or not rivals:
        return None
    best = min(rivals, key=lambda record: record["relative_error"])
    ours = min(topk, key=lambda record: record["point"]["size"])
    return (
        f"In a pretrained model top-k stays much closer to full attention than random features do: at {length:,} "
        f"tokens, already k = {ours['point']['size']} has a relative error of {ours['relative_error']:.2f}; the best "
        f"of Performer and Random Feature Attention has {best['relative_error']:.2f}, with "
        f"{best['point']['size']:,} features."
    )


def _calibration(results: Path) -> str | None:
    measure = Perplexity()
    best: tuple[float, str] | None = None
    for path in sorted((results / "calibration").glob("*.record.json")):
        record = read_json(path) or {}
        runs = [run for run in record.get("runs", []) if measure.field in run and run["feed_forward_mean_k"] is None]
        runs = [run for run in runs if not run.get("completed")]
        full = next((run for run in runs if run["kind"] == "full"), None)
        for ours in (run for run in runs if run["kind"] == "calibrated"):
            same = _uniform_beside(runs, ours)
            if full is None or same is None:
                continue
            gain = same[measure.field] - ours[measure.field]
            sentence = (
                f"It costs quality in a model that was trained without it, and calibration wins much of that back: on "
                f"{record['evaluated_on']['num_tokens']:,} tokens {record['model']['name']} has a perplexity of "
                f"{measure.number(full)} in full, {measure.number(same)} with k = {same['mean_k']} for every head and "
                f"{measure.number(ours)} with calibrated k of the same mean."
            )
            # Of a budget that most would choose, not of the smallest, which gains most and is of least use.
            if ours[measure.field] <= 1.05 * full[measure.field] and (best is None or gain > best[0]):
                best = gain, sentence
    return None if best is None else best[1]


def _uniform_beside(runs: list[Json], calibrated: Json) -> Json | None:
    """The run with one k for every head that has the mean k of a calibrated run."""
    mean_k = round(calibrated["mean_k"])
    return next((run for run in runs if run["kind"] == "uniform" and run["mean_k"] == mean_k), None)


def _training_from_scratch(results: Path) -> str | None:
    lines = read_json_lines(results / "lra" / "runs.jsonl")
    differences: dict[str, list[float]] = {}
    vanilla = {_lra_key(record): record for record in lines if record["method"] == "vanilla"}
    for record in (record for record in lines if record["method"] == "topk"):
        other = vanilla.get(_lra_key(record))
        if other is not None:
            change = 100 * (record["best"]["test_accuracy"] - other["best"]["test_accuracy"])
            differences.setdefault(record["name"], []).append(change)
    if not differences:
        return None
    means = sorted((statistics.fmean(changes), name) for name, changes in differences.items())
    (lowest, worst), (highest, best) = means[0], means[-1]
    return (
        f"In models trained from scratch on {len(differences)} small tasks of the Long Range Arena, top-k changes the "
        f"test accuracy by {lowest:+.1f} ({worst}) to {highest:+.1f} points ({best}) against full attention; the "
        "section on the arena says which of these differences its few seeds can explain."
    )


def _attention_memory(results: Path) -> str | None:
    found = _compared(results / "attention-kernel" / "length.jsonl", "topk-cpu", "sdpa")
    with_peaks = [entry for entry in found if entry.peaks_mib is not None]
    if not with_peaks:
        return None
    longest = max(with_peaks, key=lambda entry: entry.work["length"])
    assert longest.peaks_mib is not None
    ours, theirs = longest.peaks_mib
    return (
        "It does not help everywhere: without bias and dropout PyTorch's own attention has linear memory too "
        f"({theirs:,.0f} MiB at {longest.work['length']:,} tokens, top-k {ours:,.0f} MiB), so memory alone is no "
        f"reason for top-k there, and a forward pass without training gains less ({longest.forward:.1f} times as fast)."
    )


class Comparison(NamedTuple):
    """Two methods in one work of a kernel benchmark.

    ours_s, theirs_s  of a forward and backward pass, median
    forward           how many times as fast ours is in the forward pass alone
    peaks_mib         peak memory of ours and theirs in MiB; None if not recorded
    """

    work: Json
    ours_s: float
    theirs_s: float
    forward: float
    peaks_mib: tuple[float, float] | None


def _compared(path: Path, ours: str, theirs: str) -> list[Comparison]:
    """The works of a kernel benchmark in which both methods finished."""
    lines = [record for record in read_json_lines(path) if is_finished(record)]
    peaks = {
        (_work_key(record), record["request"]["method"]): record["peak_mib"]
        for record in lines
        if record.get("measured") == "measure_memory"
    }
    found: list[Comparison] = []
    for record in lines:
        methods = record.get("methods", {})
        pair = [methods.get(name, {}) for name in (ours, theirs)]
        if record.get("measured") != "time_methods" or not all("forward_backward" in method for method in pair):
            continue
        times = [method["forward_backward"]["median_s"] for method in pair]
        # Methods that use every key are recorded with k = 1.
        both = [
            peaks.get((_work_key(record), ours)),
            peaks.get((_work_key(record, k=1), theirs)),
        ]
        memory = None if both[0] is None or both[1] is None else (both[0], both[1])
        forward = pair[1]["forward"]["median_s"] / pair[0]["forward"]["median_s"]
        found.append(Comparison(record["request"]["work"], times[0], times[1], forward, memory))
    return found


def _work_key(record: Json, **changes: object) -> str:
    return str(sorted((record["request"]["work"] | changes).items()))


def _finished(path: Path) -> list[Json]:
    return [record for record in read_json_lines(path) if is_finished(record)]


def _lra_key(record: Json) -> str:
    return str((record["name"], sorted(record["config"].items()), record["seed"], sorted(record["data"].items())))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
