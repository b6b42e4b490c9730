"""What the record of a calibration shows: table, recommendation and page. Nothing in this file measures."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topk_attention.calibrate import Calibration

from ..runs.records import Json, read_json, reads, write_whole
from ..show.console import print_table
from ..show.html import drawn, footer, page, table
from ..show.plots import save
from .calibration_measures import Measure, measure_of
from .calibration_pictures import heat_maps, mass_against_k, neurons_by_layer, quality_against_k

if TYPE_CHECKING:
    from rich.console import Console

# Mean k that differ by less than this share count as the same.
_SAME_K = 0.02


def run_name(run: Json) -> str:
    """The name of a run in tables and messages: "k = 64", "calibrated, mean k = 64"; neurons are named too."""
    names = []
    if run["kind"] == "full":
        return "full attention"
    for mean, one, unit in ((run["mean_k"], "k", ""), (run["feed_forward_mean_k"], "k", " neurons")):
        if mean is not None:
            word = f"mean {one}" if run["kind"] == "calibrated" else one
            names.append(f"{word} = {_number(mean)}{unit}")
    if run.get("completed"):
        names.append("completed")
    return ("calibrated, " if run["kind"] == "calibrated" else "") + ", ".join(names)


def recommendation(record: Json) -> str:
    """Which k to use, for better or worse, in one sentence; a second one where neurons were chosen."""
    full, runs = _full(record), _attention_runs(record)
    calibrated = sorted((run for run in runs if run["kind"] == "calibrated"), key=lambda run: run["mean_k"])
    uniform = sorted((run for run in runs if run["kind"] == "uniform"), key=lambda run: run["mean_k"])
    if full is None or not calibrated:
        return "There is nothing to compare yet."
    measure = measure_of(record)
    sentence = _attention_sentence(measure, full, calibrated, uniform)
    neurons = [run for run in record["runs"] if run["mean_k"] is None and run["feed_forward_mean_k"] is not None]
    if len(neurons) == 2:
        sentence += f" {_neuron_sentence(measure, full, *sorted(neurons, key=lambda run: run['kind']))}"
    return sentence


def _attention_sentence(measure: Measure, full: Json, calibrated: list[Json], uniform: list[Json]) -> str:
    ours = next((run for run in calibrated if measure.is_close(run, full)), None)
    theirs = next((run for run in uniform if measure.is_close(run, full)), None)
    article = "an" if measure.name[0] in "aeiou" else "a"
    if ours is None and theirs is None:
        best = min([*calibrated, *uniform], key=lambda run: run[measure.field])
        return (
            f"Use a larger k or full attention: of the k tried none comes {measure.closeness(full)}, the closest being "
            f"{run_name(best)} with {article} {measure.name} of {measure.against(best, full)}."
        )
    if theirs is not None and (
        ours is None
        or theirs["mean_k"] < (1 - _SAME_K) * ours["mean_k"]
        or (_same_k(theirs, ours) and ours[measure.field] >= (1 - measure.same) * theirs[measure.field])
    ):
        beside = next((run for run in calibrated if _same_k(run, theirs)), ours or calibrated[-1])
        return (
            f"Use k = {_number(theirs['mean_k'])} for every head: its {measure.name} is "
            f"{measure.against(theirs, full)}, and calibrating gains nothing over that here ({run_name(beside)} gives "
            f"{measure.number(beside)})."
        )
    assert ours is not None
    same = next((run for run in uniform if _same_k(run, ours)), None)
    beside_it = (
        ""
        if same is None
        else f" where one k = {_number(same['mean_k'])} for every head gives {measure.short(same, full)},"
    )
    if theirs is None:
        needs = "and no single k tried comes as close" if uniform else "and no single k was tried beside it"
    else:
        needs = f"and the smallest single k tried that comes as close is {_number(theirs['mean_k'])}"
    return (
        f"Use the calibrated k with a mean of {_number(ours['mean_k'])}: its {measure.name} is "
        f"{measure.against(ours, full)},{beside_it} {needs}."
    )


def _neuron_sentence(measure: Measure, full: Json, calibrated: Json, uniform: Json) -> str:
    verdict = (
        "calibrating helps"
        if calibrated[measure.field] < (1 - measure.same) * uniform[measure.field]
        else "calibrating does not help, so use one k for all layers"
    )
    neurons = _number(calibrated["feed_forward_mean_k"])
    return (
        f"For feed-forward layers {verdict}: with {neurons} neurons on average the {measure.name} is "
        f"{measure.short(calibrated, full)} calibrated and {measure.short(uniform, full)} with the same k in every "
        "layer."
    )


def table_rows(record: Json) -> list[list[str]]:
    """Headings, then a row for each run: full attention, then by k, then runs that also choose neurons."""
    full, measure = _full(record), measure_of(record)
    rows = [["", measure.name, measure.over_heading, "time [s]", "peak memory [MiB]"]]
    for run in sorted(record["runs"], key=_place):
        over = "" if full is None or run is full else measure.over_full(run, full)
        rows.append(
            [
                run_name(run),
                measure.number(run),
                over,
                f"{run['elapsed_s']:.1f}",
                f"{run['peak_mib']:,.0f}",
            ]
        )
    return rows


def html_page(record: Json, calibration: Calibration, file_name: str) -> str:
    """One page without other files: which k to use, the pictures, the table and how it was made."""
    config, model, measured = record["config"], record["model"], record["measurement"]
    measure = measure_of(record)
    ks = [k for layer in calibration.values() for k in layer]
    million = model.get("num_parameters", 0) / 1e6
    return page(
        f"{model['name']}: how large k must be",
        f"<p><strong>{escape(recommendation(record))}</strong></p>",
        f"<p>{escape(_caveat(record))}</p>",
        drawn(f"{measure.name} against mean k", quality_picture(record)),
        table(table_rows(record)),
        f"<pre>{escape(_code(calibration, file_name))}</pre>",
        "<h2>Keys</h2>",
        f"<p>{escape(file_name)} gives each of {len(ks)} heads between {min(ks):,} and {max(ks):,} keys, "
        f"{calibration.mean_k:.1f} on average ({escape(record['calibrated_on']['target'])}).</p>",
        drawn("k and lost softmax weight by layer and head", heat_maps(calibration)),
        drawn("Softmax weight on the k best keys against k", mass_against_k(calibration)),
        *(
            ["<h2>Neurons</h2>", drawn("Neurons kept by layer", neurons_by_layer(calibration))]
            if calibration.feed_forward
            else []
        ),
        "<h2>How it was made</h2>",
        f"<p>{escape(model['name'])} ({million:,.1f} million parameters, {escape(model['revision'])}, "
        f"{escape(config['dtype'])}, no training) was measured on {escape(_calibrated_on(record))} in "
        f"{measured['elapsed_s']:.1f} s and {measured['peak_mib']:,.0f} MiB above the loaded model. It then read "
        f"{escape(_evaluated_on(record))} once for each line of the table, each time in a process of its own.</p>",
        footer(record),
    )


def quality_picture(record: Json) -> Any:
    """A figure: perplexity or embedding error against the mean k, of the runs that change attention alone."""
    return quality_against_k(_attention_runs(record), measure_of(record))


def redraw(results: Path) -> list[Path]:
    """Write page and picture of every calibration below the folder of all results again; return their paths."""
    written = []
    for path in sorted((results / "calibration").glob("*.record.json")):
        record = read_json(path)
        file = path.with_name(f"{path.name.removesuffix('.record.json')}.json")
        if record is None or not file.exists():
            continue
        written += reads()(_redraw)(path, record, file)
    return written


def _redraw(path: Path, record: Json, file: Path) -> list[Path]:
    page_file, png = file.with_suffix(".html"), file.with_suffix(".png")
    write_whole(page_file, html_page(record, Calibration.load(file), file.name))
    save(quality_picture(record), png)
    return [page_file, png]


def show(record: Json, console: Console) -> None:
    """Show the table and the recommendation on the console."""
    title = f"{record['model']['name']}, {record['evaluated_on']['num_tokens']:,} tokens"
    headings, *rows = table_rows(record)
    print_table(console, title, headings, rows)
    console.print(recommendation(record), markup=False, highlight=False, soft_wrap=True)


def _code(calibration: Calibration, file_name: str) -> str:
    """How to use the file, in Python."""
    neurons = ", feed_forward_k=calibration.feed_forward" if calibration.feed_forward else ""
    return f"""from topk_attention import Calibration, MeanK, convert

calibration = Calibration.load({file_name!r})
convert(model, attention_k=calibration{neurons})
convert(model, attention_k=calibration.reallocated(MeanK(128)))  # another budget, same measurements"""


def _caveat(record: Json) -> str:
    if record["evaluated_on"].get("overlaps_calibration"):
        return (
            "The text it was evaluated on overlaps the text it was calibrated on, which flatters the calibrated k: "
            "give another --evaluate-start or --evaluate-text."
        )
    return (
        f"This holds for {record['evaluated_on']['num_tokens']:,} tokens of one text, none of which was calibrated on; "
        "other texts, and longer ones above all, may need more."
    )


def _calibrated_on(record: Json) -> str:
    on = record["calibrated_on"]
    windows = "" if on["windows"] == 1 else f"{on['windows']} windows of "
    return f"{windows}{on['num_tokens']:,} tokens of {on['text']} from character {on['start']:,}"


def _evaluated_on(record: Json) -> str:
    on = record["evaluated_on"]
    start = f"from character {on['start']:,}" if isinstance(on["start"], int) else str(on["start"])
    return f"{on['num_tokens']:,} tokens of {on['text']} {start}"


def _attention_runs(record: Json) -> list[Json]:
    """Full attention, and every run that changes attention alone."""
    return [
        run
        for run in record["runs"]
        if run["feed_forward_mean_k"] is None and (run["kind"] == "full" or run["mean_k"] is not None)
    ]


def _place(run: Json) -> tuple[bool, float, str]:
    return run["feed_forward_mean_k"] is not None, round(run["mean_k"] or 0), run["kind"]


def _full(record: Json) -> Json | None:
    return next((run for run in record["runs"] if run["kind"] == "full"), None)


def _same_k(one: Json, other: Json) -> bool:
    return abs(one["mean_k"] - other["mean_k"]) <= _SAME_K * other["mean_k"]


def _number(mean_k: float) -> str:
    return f"{mean_k:,.0f}" if mean_k >= 10 or mean_k == int(mean_k) else f"{mean_k:.1f}"
