import pytest
from rich.console import Console

from topk_experiments.lra.quoted import quoted_accuracies
from topk_experiments.lra.table import draw_curves, table_in_words, write_table
from topk_experiments.runs.records import append_json_line


def record(method="topk", seed=0, accuracy=0.4, name="listops-small", task="listops", **changes):
    curve = [
        {"step": 10 * n, "validation_accuracy": accuracy * n / 2, "training_loss": 1.0, "validation_loss": 2.0}
        for n in (1, 2)
    ]
    return {
        "name": name,
        "config": {
            "task": task,
            "settings": {},
            "model": {"num_layers": 2, "d_model": 64, "num_heads": 2},
            "training": {"steps": 20, "batch": 32},
        },
        "method": method,
        "options": {"k": 128} if method.startswith("topk") else {},
        "seed": seed,
        "data": {"train": "a"},
        "num_examples": {"train": 1000, "validation": 50, "test": 100},
        "majority_share": {"train": 0.2, "validation": 0.21, "test": 0.17},
        "num_parameters": 12345,
        "steps": 480,
        "other_cores": 0.0,
        "curve": curve,
        "best": {"step": 20, "validation_accuracy": accuracy, "test_accuracy": accuracy},
        "last": {"step": 20, "test_accuracy": accuracy - 0.01},
        "elapsed_s": 600.0,
        "processor_s": 90.0,
        "median_step_s": 0.25,
        "peak_mib": 300.0,
        "device": "cpu",
        "num_processes": 1,
        "threads": 2,
        "environment": {"cpu": "A processor", "torch": "2.13", "num_cpus": 2},
    } | changes


def rows(table):
    """First cell -> the other cells, of the rows about the first configuration."""
    section = table.split("\n## ")[1]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {first: others for first, *others in cells}


def test_a_row_has_mean_and_spread_over_seeds_and_medians():
    values = ((2, 0.5, 0.1), (0, 0.4, 0.7), (1, 0.42, 0.25))
    runs = [record(seed=seed, accuracy=a, median_step_s=s) for seed, a, s in values]
    row = rows(table_in_words(runs))["topk, k = 128"]
    assert row == ["0, 1, 2", "44.00 ± 5.29", "43.00 ± 5.29", "44.00 ± 5.29", "0.250", "2.0", "1.5", "300"]


def test_one_seed_has_no_spread():
    assert rows(table_in_words([record("vanilla")]))["vanilla"][:2] == ["0", "40.00"]


def test_methods_stand_in_one_order_and_other_options_in_another_row():
    runs = [record("topk"), record("topk", options={"k": 64}), record("vanilla"), record("query-chunks")]
    assert list(rows(table_in_words(runs)))[1:] == ["vanilla", "query-chunks", "topk, k = 128", "topk, k = 64"]


def test_runs_on_other_data_stand_apart():
    table = table_in_words([record(seed=0), record(seed=1, data={"train": "b"})])
    first, second = (line for line in table.splitlines() if line.startswith("## "))
    assert (first, second) == ("## listops-small (earlier settings or data, 1)", "## listops-small")
    assert "| accuracy, % | listops-small (earlier settings or data, 1) | listops-small |" in table
    assert "±" not in table


def test_several_options_of_a_method_are_told_apart_in_the_overview():
    runs = [record("rfa", options={"num_features": 8}), record("rfa", options={"num_features": 8, "sigma": 3.0})]
    overview = table_in_words(runs).split("\n## ")[0]
    assert "| rfa | num_features = 8: 40.00 (1 seed); num_features = 8, sigma = 3.0: 40.00 (1 seed) |" in overview


def test_what_was_published_is_marked_as_quoted():
    overview = table_in_words([record()]).partition("## ")[0]
    assert "| Transformer (quoted: Tay et al. 2021) | 36.37 |" in overview
    for model, accuracy in (("top-128, at the best evaluation", "36.56"), ("top-128, at the last step", "37.81")):
        assert f"| {model} (quoted: Gupta et al. 2021, read off its figures) | {accuracy} |" in overview
    assert "320 examples (standard error 2.7)" in overview
    assert "(quoted" not in table_in_words([record(task="same-document")])


def test_one_table_holds_every_task_and_method_with_the_number_of_seeds():
    runs = [record("vanilla"), record("topk", 0, 0.4), record("topk", 1, 0.5)]
    runs.append(record("vanilla", name="image-small", task="image", accuracy=0.25))
    overview = table_in_words(runs).partition("## ")[0].splitlines()
    assert "| accuracy, % | listops-small | image-small |" in overview
    assert "| most frequent label | 17.00 | 17.00 |" in overview
    assert "| vanilla | 40.00 (1 seed) | 25.00 (1 seed) |" in overview
    assert "| topk | 45.00 ± 7.07 (2 seeds) |  |" in overview
    assert "| Transformer (quoted: Tay et al. 2021) | 36.37 | 42.44 |" in overview
    assert (
        "| top-128, at the best evaluation (quoted: Gupta et al. 2021, read off its figures) | 36.56 |  |" in overview
    )


@pytest.mark.parametrize(
    ("task", "models", "best"),
    [
        ("listops", 15, 39.06),
        ("text", 13, 65.90),
        ("retrieval", 13, 59.59),
        ("image", 11, 44.24),
        ("pathfinder", 11, 77.05),
    ],
)
def test_every_published_task_has_its_accuracies(task, models, best):
    quoted = quoted_accuracies(task)
    assert len(quoted) == models
    assert max(accuracy for _, accuracy, _ in quoted) == best


def test_pathfinder_is_quoted_at_the_published_resolution_alone():
    of = record(task="pathfinder")["config"]
    assert "Performer (quoted: Tay et al. 2021) | 77.05" in table_in_words([record(task="pathfinder")])
    for resolution, quoted in ((32, True), (16, False), (128, False)):
        table = table_in_words([record(config=of | {"settings": {"resolution": resolution}})])
        assert ("Performer" in table) == quoted
        assert ("distance of the circles" in table) == quoted


def test_runs_that_are_not_clearly_above_a_guess_without_a_model_are_named():
    guess = {"by first operator": {"train": 0.36, "validation": 0.34, "test": 0.35}}
    runs = [record(accuracy=0.3, baselines=guess), record("vanilla", accuracy=0.4), record("rfa", accuracy=0.6)]
    table = table_in_words(runs)  # a standard error of 100 answers is 4.9 points
    assert "Guessing by first operator is right for 35.0% of the test examples, without a model." in table
    named = "topk, k = 128, seed 0 (30.0%); vanilla, seed 0 (40.0%)."
    assert f"Less than 5 standard errors above it: {named}" in table
    assert "standard errors above it" not in table_in_words([record(accuracy=0.6, baselines=guess)])


def test_runs_that_are_not_clearly_above_the_most_frequent_label_are_named():
    # (0.4 - 0.17) / sqrt(0.4 * 0.6 / 100) = 4.69 and (0.6 - 0.17) / sqrt(0.6 * 0.4 / 100) = 8.78
    unclear = table_in_words([record(accuracy=0.4), record("vanilla", seed=2, accuracy=0.6)])
    assert (
        "standard errors of their test accuracy above the most frequent label: topk, k = 128, seed 0 (4.7)." in unclear
    )
    clear = table_in_words([record(accuracy=0.7), record("vanilla", accuracy=0.6)])
    assert "Every run is at least 8.8 standard errors of its test accuracy above the most frequent label." in clear


def test_top_k_is_held_against_vanilla_of_the_same_seed():
    accuracies = {"vanilla": {0: 0.50, 1: 0.40, 2: 0.45, 3: 0.9}, "topk": {2: 0.46, 0: 0.52, 1: 0.40, 4: 0.1}}
    runs = [record(method, seed, a) for method, of in accuracies.items() for seed, a in of.items()]
    table = table_in_words(runs)
    assert "topk, k = 128 minus vanilla with the same seed, mean and its standard error over 3 seeds: " in table
    # +2, 0 and +1 points: mean 1, deviation 1, divided by the square root of 3
    assert (
        "+1.00 ± 0.58 points at the best validation (+2.00, +0.00, +1.00; 0 is within the 95 % interval, ± 2.48)"
        in table
    )
    apart = [record("vanilla", seed, 0.4) for seed in range(3)]
    apart += [record("topk", seed, a) for seed, a in enumerate((0.5, 0.51, 0.52))]
    assert "(+10.00, +11.00, +12.00; 0 is outside the 95 % interval, ± 2.48)" in table_in_words(apart)
    assert "minus vanilla" not in table_in_words([record("topk"), record("vanilla")])


def test_completed_attention_is_held_against_vanilla_and_against_the_same_keys_alone():
    accuracies = {"vanilla": (0.5, 0.4), "topk": (0.4, 0.3), "topk-completed": (0.52, 0.43)}
    runs = [record(method, seed, a) for method, of in accuracies.items() for seed, a in enumerate(of)]
    table = table_in_words([*runs, *(record("topk", seed, 0.1, options={"k": 8}) for seed in range(2))])
    words = "mean and its standard error over 2 seeds: "
    assert f"topk-completed, k = 128 minus vanilla with the same seed, {words}+2.50" in table
    assert f"topk-completed, k = 128 minus topk, k = 128 with the same seed, {words}+12.50" in table
    assert "topk-completed, k = 128 minus topk, k = 8" not in table


def test_query_chunks_are_held_against_vanilla():
    vanilla = record("vanilla", accuracy=0.4)
    same = vanilla | {"method": "query-chunks"}
    words = "query-chunks, seed 0, against vanilla: the losses of the curve differ by at most "
    assert f"{words}0.0e+00 of their size, the number of right test answers by 0." in table_in_words([vanilla, same])
    curve = [point | {"validation_loss": 2.0 + 0.002 * n} for n, point in enumerate(vanilla["curve"])]
    other = same | {"curve": curve, "best": same["best"] | {"test_accuracy": 0.42}}
    assert f"{words}1.0e-03 of their size, the number of right test answers by 2." in table_in_words([vanilla, other])
    stopped = other | {"curve": curve[:1]}  # before the losses part
    assert f"{words}0.0e+00 of their size, the number" in table_in_words([vanilla, stopped])
    assert "against vanilla" not in table_in_words([vanilla, other | {"seed": 1}])
    assert "against vanilla" not in table_in_words([vanilla, other | {"curve": [curve[0] | {"step": 7}]}])


def test_busy_cores_are_told():
    assert "up to 1.7 of 2 cores busy" in table_in_words([record(), record(seed=1, other_cores=1.7)])
    assert "busy" not in table_in_words([record()])


def test_the_picture_has_a_panel_for_each_configuration():
    one = draw_curves([record("vanilla"), record("topk")])
    two = draw_curves([record("vanilla"), record("topk", name="image-small", task="image")])
    assert [len(figure.axes) for figure in (one, two)] == [1, 2]
    assert two.get_figwidth() == 2 * one.get_figwidth()


def test_table_and_picture_are_written_from_the_records_alone(tmp_path):
    console = Console(width=160, record=True)
    with pytest.raises(
        ValueError, match=r"no finished runs in .*runs.jsonl; train some with topk-experiments lra train"
    ):
        write_table(tmp_path, console)
    for method in ("vanilla", "topk"):
        append_json_line(tmp_path / "runs.jsonl", record(method))
    table, picture = write_table(tmp_path, console)
    assert "| vanilla |" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
