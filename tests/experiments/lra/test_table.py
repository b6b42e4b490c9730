import pytest
from rich.console import Console

from topk_attention.experiments.lra.quoted import quoted_accuracies
from topk_attention.experiments.lra.table import draw_curves, table_in_words, write_table
from topk_attention.experiments.records import append_json_line


def record(method="topk", seed=0, accuracy=0.4, name="listops-small", task="listops", **changes):
    curve = [
        {"step": 10 * n, "validation_accuracy": accuracy * n / 2, "training_loss": 1.0, "elapsed_s": 1.0}
        for n in (1, 2)
    ]
    return {
        "name": name,
        "config": {
            "task": task,
            "model": {"num_layers": 2, "d_model": 64, "num_heads": 2},
            "training": {"steps": 20, "batch": 32},
        },
        "method": method,
        "options": {"k": 128} if method == "topk" else {},
        "seed": seed,
        "data": {"train": "a"},
        "num_examples": {"train": 1000, "validation": 50, "test": 100},
        "majority_share": {"train": 0.2, "validation": 0.21, "test": 0.17},
        "num_parameters": 12345,
        "curve": curve,
        "best": {"step": 20, "validation_accuracy": accuracy, "test_accuracy": accuracy},
        "last": {"step": 20, "test_accuracy": accuracy - 0.01},
        "steps": 20,
        "elapsed_s": 600.0,
        "processor_s": 4.0,
        "median_step_s": 0.25,
        "peak_mib": 300.0,
        "device": "cpu",
        "num_processes": 1,
        "threads": 2,
        "environment": {"cpu": "A processor", "torch": "2.13"},
    } | changes


def rows(table):
    """First cell -> the other cells, of all rows above what is quoted."""
    cells = [line.strip("| ").split(" | ") for line in table.partition("Quoted")[0].splitlines() if line[:2] == "| "]
    return {first: others for first, *others in cells}


def test_a_row_has_mean_and_spread_over_seeds_and_medians():
    runs = [record(seed=seed, accuracy=a, elapsed_s=s) for seed, a, s in ((2, 0.5, 540), (0, 0.4, 60), (1, 0.42, 120))]
    row = rows(table_in_words(runs))["topk, k = 128"]
    assert row == ["0, 1, 2", "44.00 ± 5.29", "43.00 ± 5.29", "44.00 ± 5.29", "0.250", "0.200", "2.0", "300"]


def test_one_seed_has_no_spread():
    assert rows(table_in_words([record("vanilla")]))["vanilla"][:2] == ["0", "40.00"]


def test_methods_stand_in_one_order_and_other_options_in_another_row():
    runs = [record("topk"), record("topk", options={"k": 64}), record("vanilla"), record("query-chunks")]
    assert list(rows(table_in_words(runs)))[1:] == ["vanilla", "query-chunks", "topk, k = 128", "topk, k = 64"]


def test_runs_on_other_data_stand_apart():
    table = table_in_words([record(seed=0), record(seed=1, data={"train": "b"})])
    assert table.count("## listops-small") == 2
    assert "±" not in table


def test_what_was_published_is_marked_as_quoted():
    table = table_in_words([record()])
    assert "| Transformer | 36.37 | quoted: Tay et al. 2021 |" in table
    assert "| top-128 | 36.56 | quoted: Gupta et al. 2021, read off its figures |" in table
    assert "The most frequent label is right for 17.0%" in table
    assert "Quoted" not in table_in_words([record(task="same-document")])


@pytest.mark.parametrize(
    ("task", "models", "best"),
    [
        ("listops", 13, 39.06),
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


def test_the_picture_has_a_panel_for_each_configuration():
    one = draw_curves([record("vanilla"), record("topk")])
    two = draw_curves([record("vanilla"), record("topk", name="image-small", task="image")])
    assert one.startswith(b"\x89PNG")
    assert int.from_bytes(two[16:20]) == 2 * int.from_bytes(one[16:20])


def test_table_and_picture_are_written_from_the_records_alone(tmp_path):
    console = Console(width=160, record=True)
    with pytest.raises(ValueError, match=r"no finished runs in .*runs.jsonl; train some with topk-attention lra train"):
        write_table(tmp_path, console)
    for method in ("vanilla", "topk"):
        append_json_line(tmp_path / "runs.jsonl", record(method))
    table, picture = write_table(tmp_path, console)
    assert "| vanilla |" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
