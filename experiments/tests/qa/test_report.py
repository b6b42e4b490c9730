import json
import math

import pytest

from topk_experiments.qa import evaluation, finetuning, report
from topk_experiments.qa.published import TABLES, curves
from topk_experiments.qa.report import write_report


def record(
    setting,
    name,
    outcomes,
    *,
    share=None,
    model="tiny",
    revision="1",
    commit="abc",
    dtype="float32",
    torch="2",
    **questions,
):
    """A record as evaluations write them."""
    environment = {"topk_attention": "0", "torch": torch, "transformers": "5", "commit": commit}
    lengths = {"mean_tokens": 30.0, "most_tokens": 50} | ({} if share is None else {"share_beyond_k": share})
    return {
        "schema": evaluation.SCHEMA,
        "model": {"name": model, "revision": revision},
        "questions": {"name": name, "sha256": name, "number": 9, "asked": len(outcomes), "seed": 0} | questions,
        "protocol": {"prompt": 1, "reader": "choices", "shots": 5},
        "setting": {"attention_k": None, "feed_forward_k": None} | setting,
        "run": {"backend": "cpu", "threads": 1, "dtype": dtype},
        "scores": {name: {"value": 0.0, "error": 0.0} for name in ("accuracy", "accuracy_by_length")},
        "outcomes": {"accuracy": outcomes, "accuracy_by_length": outcomes},
        "lengths": lengths,
        "elapsed_s": 60.0,
        "environment": environment | {"cpu": "a cpu", "num_cpus": 2, "date": "2026-11-24T17:02:59+00:00"},
    }


def as_text(record, f1=None):
    """The same of a text-to-text model."""
    exact = record["outcomes"]["accuracy"]
    return record | {
        "protocol": {"prompt": "UnifiedQA's", "reader": "text"},
        "scores": dict.fromkeys(("exact_match", "f1")),
        "outcomes": {"exact_match": exact, "f1": exact if f1 is None else f1},
    }


def trained(setting, outcomes, *, points=(60, 120, 180), other_cores=0.0, commit="abc", questions="train", **training):
    """A record as trainings write them, a point of the curve every 100 steps."""
    usual = {"from_scratch": True, "steps": 100 * len(points), "batch": 64, "learning_rate": 0.01, "falls": True}
    return as_text(record(setting, "test", outcomes, commit=commit)) | {
        "schema": finetuning.SCHEMA,
        "training": usual | {"seed": 0} | training | {"questions": {"name": "t", "sha256": questions, "number": 1000}},
        "questions": {"name": "test", "sha256": "test", "number": len(outcomes)},
        "curve": [{"step": 100 * number, "elapsed_s": seconds} for number, seconds in enumerate(points, 1)],
        "elapsed_s": points[-1],
        "other_cores": other_cores,
    }


@pytest.fixture
def page(tmp_path):
    def write(evaluations=(), trainings=()):
        for name, records in ((evaluation.RECORDS, evaluations), (finetuning.RECORDS, trainings)):
            (tmp_path / name).write_text("".join(f"{json.dumps(some)}\n" for some in records))
        write_report(tmp_path, lambda _: None)
        return (tmp_path / "qa.md").read_text()

    return write


def headings(page):
    return [line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")]


def cells(page, title, row):
    """The cells of a row in the first table under a title."""
    table = page.split(title, 1)[1].split("\n\n")[1]
    return next(line for line in table.splitlines() if line.startswith(f"| {row} |")).strip("| ").split(" | ")[1:]


def test_scores_means_and_paired_changes_stand_in_the_table(page):
    written = page(
        [
            record({}, "one", "1100"),
            record({"attention_k": 8}, "one", "1000", share=0.25),
            record({}, "two", "1111"),
            record({"attention_k": 8}, "two", "1101", share=0.75),
        ]
    )
    half = 100 * math.sqrt(0.25 / 3)  # the error of two right answers of four
    assert cells(written, "**Accuracy**", "full") == [f"50.0 ± {half:.1f}", "100.0 ± 0.0", f"75.0 ± {half / 2:.1f}"]
    # -1, 0, 0, 0: the difference question by question, not of two independent shares
    assert cells(written, "Change of accuracy", "attention k = 8") == ["-25.0 ± 25.0", "-25.0 ± 25.0", "-25.0 ± 17.7"]
    assert cells(written, "Queries that see more than k keys", "attention k = 8") == ["25", "75"]
    assert "|  | one (4 of 9) | two (4 of 9) | mean |" in written
    assert "2 examples" not in written
    assert "tiny, choices by likelihood, 5 examples before each question" in written
    assert "4 minutes in all; 2026-11-24, commit abc." in written


def test_a_mean_is_over_the_sets_that_are_compared_and_says_how_many_a_setting_has(page):
    written = page(
        [
            *(record({}, name, outcomes) for name, outcomes in (("one", "1100"), ("two", "1111"), ("three", "1111"))),
            record({"attention_k": 8}, "one", "1000"),
            record({"attention_k": 8}, "two", "1111"),
            record({"attention_k": 2}, "two", "1111"),
            record({"attention_k": 4}, "four", "1111"),
        ]
    )
    half = 100 * math.sqrt(0.25 / 3)
    quarter = ["25.0 ± 25.0", "100.0 ± 0.0", "-", "-", "62.5 ± 12.5"]
    assert cells(written, "**Accuracy**", "attention k = 8") == quarter
    # Not over the third, which the full model alone has answered.
    assert cells(written, "**Accuracy**", "full")[2:] == ["100.0 ± 0.0", "-", f"75.0 ± {half / 2:.1f}"]
    assert cells(written, "**Accuracy**", "attention k = 2")[-1] == "100.0 ± 0.0 (1 set)"
    assert cells(written, "**Accuracy**", "attention k = 4")[3:] == ["100.0 ± 0.0", "-"]
    assert cells(written, "Change of accuracy", "attention k = 8")[-1] == "-12.5 ± 12.5"
    assert cells(written, "Change of accuracy", "attention k = 2")[-1] == "+0.0 ± 0.0 (1 set)"
    assert cells(written, "Change of accuracy", "attention k = 4") == ["-"] * 5


def test_the_full_model_stands_first_whenever_it_was_recorded(page):
    written = page([record({"attention_k": 8}, "one", "1000"), record({}, "one", "1100")])
    assert written.index("| full |") < written.index("| attention k = 8 |")


def test_of_two_records_of_one_point_the_later_counts(page):
    written = page([record({}, "one", "0000", commit="old"), record({}, "one", "1111", commit="new")])
    assert cells(written, "**Accuracy**", "full") == ["100.0 ± 0.0"]
    assert "commit new" in written


def test_questions_of_one_name_and_another_content_or_draw_stand_in_columns_of_their_own(page):
    written = page(
        [
            record({}, "one", "1100"),
            record({}, "one", "1000", seed=1),
            record({}, "one", "1111", sha256="0420b54464f41432"),
            record({"attention_k": 8}, "one", "0000", seed=1),
        ]
    )
    # All three of 4 of 9 questions, so that a change of one against another could be taken.
    sets = ["sha256 one, seed 0", "sha256 one, seed 1", "sha256 0420b544, seed 0"]
    assert f"|  | {' | '.join(f'one (4 of 9), {some}' for some in sets)} |" in written
    values = [cell.split(" ")[0] for cell in cells(written, "**Accuracy**", "full")]
    assert values[:3] == ["50.0", "25.0", "100.0"]
    assert cells(written, "Change of accuracy", "attention k = 8")[:3] == ["-", "-25.0 ± 25.0", "-"]


def test_calibrations_are_told_apart_by_their_files(page):
    def calibrated(file, sha256, mean_k=767.933):
        return record({"feed_forward_k": {"file": file, "sha256": sha256, "mean_k": mean_k}}, "one", "1000")

    written = page(
        [calibrated("novel.json", "a"), calibrated("science.json", "b"), calibrated("wide.json", "c", 1024.0)]
    )
    for name in ("novel, mean k = 767.9", "science, mean k = 767.9", "wide, mean k = 1024"):
        assert cells(written, "**Accuracy**", f"feed-forward calibrated by {name}") == ["25.0 ± 25.0"]
    written = page([calibrated("novel.json", "a"), calibrated("novel.json", "b")])
    for some in "ab":
        name = f"feed-forward calibrated by novel, mean k = 767.9, feed forward k sha256 {some}"
        assert cells(written, "**Accuracy**", name) == ["25.0 ± 25.0"]


def test_evaluations_of_other_models_prompts_and_versions_stand_in_tables_named_after_what_differs(page):
    first, prompt = record({}, "one", "1100"), record({}, "one", "1010")
    prompt["protocol"] = prompt["protocol"] | {"prompt": 2}
    other, newer = record({}, "one", "1000", revision="02212c2976ba7423"), record({}, "one", "0000", torch="3")
    usual = "tiny, choices by likelihood, 5 examples before each question"
    assert headings(page([first])) == [usual]
    assert headings(page([first, prompt])) == [f"{usual}, prompt 1", f"{usual}, prompt 2"]
    assert headings(page([first, other])) == [f"{usual}, revision 1", f"{usual}, revision 02212c29"]
    assert headings(page([first, newer])) == [f"{usual}, torch 2", f"{usual}, torch 3"]


def test_trainings_stand_in_tables_named_after_what_differs(page):
    usual = "tiny, trained from scratch: 300 steps of 64 questions from t (1,000)"
    first, limited = trained({}, "1100"), trained({"attention_k": 8}, "1000")
    assert headings(page([], [first, limited])) == [usual]
    for other, told in (
        ({"seed": 1}, ("seed 0", "seed 1")),
        ({"learning_rate": 0.001}, ("learning rate 0.01", "learning rate 0.001")),
        ({"falls": False}, ("learning rate falling", "learning rate constant")),
        ({"questions": "72f9bf6526c0"}, ("questions sha256 train", "questions sha256 72f9bf65")),
    ):
        assert headings(page([], [first, trained({}, "0000", **other)])) == [f"{usual}, {some}" for some in told]
    # Not said where it is as usual.
    written = page([], [first, limited, trained({}, "0000", beta2=0.98, seed=1)])
    assert headings(written) == [f"{usual}, seed 0", f"{usual}, seed 1, beta2 0.98"]
    assert cells(written, "Change of exact match", "attention k = 8") == ["-25.0 ± 25.0"]
    assert cells(written.split("beta2 0.98")[1], "**Exact match**", "full") == ["0.0 ± 0.0"]


def test_a_training_says_what_its_errors_leave_out(page):
    sentence = "Errors are over the questions, of one training each; another seed may differ by more."
    written = page([record({}, "one", "1100")], [trained({}, "1100"), trained({"attention_k": 8}, "1000")])
    before, after = written.split("## Trained")
    assert sentence in after
    assert sentence not in before
    assert cells(after, "**Exact match**", "full") == ["50.0 ± 28.9"]
    assert cells(after, "Change of F1", "attention k = 8") == ["-25.0 ± 25.0"]
    assert sentence not in page([record({}, "one", "1100")])


def test_the_time_of_a_training_leaves_out_stalls_and_tells_of_busy_machines(page):
    # 60 s each, but for one stretch in which the machine stood still for an hour
    stalled = trained({}, "1100", points=(60, 3720, 3780, 3840))
    written = page([], [stalled, trained({"attention_k": 8}, "1000", points=(60, 120, 180, 240))])
    assert "on a cpu; 8 minutes of training in all, by the median step; 2026-11-24, commit abc." in written
    assert "Other processes" not in written
    written = page([], [trained({}, "1100", commit=None), trained({"attention_k": 8}, "1000", other_cores=1.5)])
    assert "commit unknown, abc. Other processes kept up to 1.5 of 2 cores busy meanwhile" in written
    assert "None" not in written


def test_the_last_stretch_of_a_training_may_be_shorter(page):
    arm = trained({}, "1100", points=(60, 120, 135))
    arm["curve"][-1]["step"] = 225
    assert "; 2 minutes of training in all" in page([], [arm])


def test_shares_of_queries_say_what_is_counted_and_tell_few_from_none(page):
    points = [record({}, name, "1100") for name in ("one", "two", "three", "four")]
    shares = (0.004, 0.996, 1.0, 0.0)
    points += [
        record({"attention_k": 8}, name, "1100", share=share)
        for name, share in zip(("one", "two", "three", "four"), shares, strict=True)
    ]
    written = page(points)
    assert cells(written, "Queries that see more than k keys", "attention k = 8") == ["0.4", "99.6", "100", "0"]
    assert "Counted are the tokens of the question and its choices, not those of solved examples before it" in written
    written = page([as_text(point) for point in points])
    assert "Counted is the encoder's input alone" in written
    assert "solved examples" not in written


def test_points_in_another_dtype_stand_in_a_table_of_their_own(page):
    written = page([record({}, "one", "1100"), record({"attention_k": 8}, "one", "1111", dtype="bfloat16")])
    ours, other = written.split("### tiny, choices by likelihood, 5 examples before each question, in bfloat16")
    assert "attention k = 8" not in ours
    assert "float32 on a cpu" in ours
    assert "bfloat16 on a cpu" in other


def test_published_numbers_are_marked_as_quoted_and_stand_apart(page):
    ours, quoted = page([record({}, "one", "1100")]).split("## Published (quoted)")
    assert "NarrativeQA" not in ours
    assert "| BoolQ | 90.7 | 90.8 | 90.8 | 90.7 | 90.4 | 90 | 89.7 | 88.7 |" in quoted
    assert "| base, d_ff 3,072 | 62.4 | - | 62.4 |" in quoted


def test_published_means_are_those_of_their_rows():
    table = TABLES[0]
    rows = [values for name, values in table.rows.items() if not name.startswith("mean")]
    for column in range(len(table.columns)):
        assert table.rows["mean EM"][column] == pytest.approx(sum(row[column] for row in rows) / len(rows), abs=0.006)
    for some in TABLES:
        assert all(len(values) == len(some.columns) for values in some.rows.values())
    assert curves()["UnifiedQA 3B, 10 sets (quoted)"][16] == 64.35


@pytest.fixture
def drawn(page, monkeypatch):
    """-> the figure of these evaluations, as it is saved, and the page."""

    def draw(evaluations):
        figures = []
        monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
        written = page(evaluations)
        return figures[0], written

    return draw


def points_of(axes):
    """Label -> (k, score) of what is drawn with error bars."""
    return {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}


def levels_of(axes):
    return [line.get_ydata()[0] for line in axes.lines if line.get_label() == "full model"]


def legend_of(figure):
    return [text.get_text() for text in figure.axes[-2].get_legend().get_texts()]


CALIBRATED = {"file": "novel.json", "sha256": "a", "mean_k": 7.96}
BY_LENGTH = "accuracy, likelihoods divided by the choice's characters"


def test_the_picture_has_a_row_of_panels_for_each_model_with_a_y_axis_of_its_own(drawn):
    decoder = [
        record({}, "one", "1100"),
        record({"attention_k": 8}, "one", "1000"),
        record({"attention_k": 4}, "one", "0000"),
        record({"attention_k": CALIBRATED}, "one", "1100"),
        record({"feed_forward_k": 16}, "one", "1110"),
    ]
    high = "1" * 99 + "0"
    other = [as_text(record(setting, "one", high, model="t5")) for setting in ({}, {"feed_forward_k": 32})]
    figure, _ = drawn([*decoder, *other, record({}, "one", "1111", model="full alone")])
    attention, neurons, no_attention, text, legend, published = figure.axes
    assert points_of(attention) == {BY_LENGTH: [[4, 0], [8, 25]], "calibrated, at its mean k": [[7.96, 50]]}
    assert points_of(neurons) == {BY_LENGTH: [[16, 75]]}
    assert levels_of(attention) == levels_of(neurons) == [50]
    assert points_of(text) == {"exact match": [[32, 99]]}
    assert not no_attention.containers
    assert not no_attention.axison
    assert attention.get_ylim() == neurons.get_ylim()
    assert text.get_ylim()[0] > 90
    assert published.get_ylim()[1] < 90
    assert attention.containers[1].lines[0].get_markerfacecolor() == "none"
    assert [label.get_text() for label in attention.get_xticklabels()] == ["4", "8"]
    assert not legend.axison
    assert sorted(legend_of(figure)) == sorted([BY_LENGTH, "calibrated, at its mean k", "exact match", "full model"])
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "tiny, choices by likelihood, 5 examples before each question: one (4 of 9)",
        "t5, in its own words: one (100 of 9); F1 is within 0.3 of exact match",
        "Published (quoted): other models, whole development sets",
    ]


def test_the_picture_draws_f1_where_it_differs_from_exact_match(drawn):
    points = [record({}, "one", "1100"), record({"attention_k": 8}, "one", "1000")]
    figure, _ = drawn([as_text(points[0]), as_text(points[1], [1.0, 0.5, 0.0, 0.0])])
    assert points_of(figure.axes[0]) == {"exact match": [[8, 25]], "F1": [[8, 37.5]]}
    assert "F1" in legend_of(figure)
    exact, other = (bars.lines[0] for bars in figure.axes[0].containers)
    assert exact.get_color() == other.get_color()
    assert exact.get_linestyle() != other.get_linestyle()
    assert "F1" not in figure.subfigs[0].get_suptitle()


def test_the_picture_draws_what_has_all_sets_and_the_page_names_what_it_lacks(drawn):
    figure, written = drawn(
        [
            *(record({}, name, outcomes) for name, outcomes in (("one", "1100"), ("two", "1111"), ("alone", "0000"))),
            *(record({"attention_k": 8}, name, "1000") for name in ("one", "two", "another")),
            record({"attention_k": 4}, "two", "1111"),
            *(record({"attention_k": 8, "feed_forward_k": 8}, name, "1000") for name in ("one", "two")),
        ]
    )
    # Over the two sets that the full model shares with others: a set that it alone answered compares nothing.
    assert points_of(figure.axes[0]) == {BY_LENGTH: [[8, 25]]}
    assert levels_of(figure.axes[0]) == [75]
    assert figure.subfigs[0].get_suptitle().endswith("before each question: mean over 2 sets")
    assert (
        "Not in the picture: attention k = 4 (1 of 2 sets); attention k = 8, feed-forward k = 8 (limits both)."
        in written
    )
    assert "Not in the picture" not in drawn([record({}, "one", "1"), record({"attention_k": 8}, "one", "1")])[1]


def test_completed_k_are_a_curve_of_their_own(drawn):
    settings = {"1100": {}, "1000": {"attention_k": 8}, "1110": {"attention_k": 8, "completed": True}}
    settings["1111"] = {"attention_k": CALIBRATED, "completed": True}
    figure, written = drawn([record(setting, "one", outcomes) for outcomes, setting in settings.items()])
    assert points_of(figure.axes[0]) == {
        BY_LENGTH: [[8, 25]],
        f"{BY_LENGTH}, completed": [[8, 75]],
        "calibrated, completed, at its mean k": [[7.96, 100]],
    }
    alone, completed, calibrated = (bars.lines[0] for bars in figure.axes[0].containers)
    assert alone.get_color() != completed.get_color() == calibrated.get_color()
    assert cells(written, "**Accuracy**", "attention k = 8") == ["25.0 ± 25.0"]
    assert cells(written, "**Accuracy**", "attention k = 8, completed") == ["75.0 ± 25.0"]
    assert "Not in the picture" not in written


def test_published_curves_stand_in_a_panel_of_their_own_with_their_number_of_sets(drawn):
    figure, _ = drawn([as_text(record({}, "one", "1100")), as_text(record({"feed_forward_k": 8}, "one", "1000"))])
    own, published = figure.axes[1], figure.axes[-1]
    assert [text.get_text() for text in published.texts] == [
        "UnifiedQA 11B, 12 sets (quoted)",
        "UnifiedQA 3B, 10 sets (quoted)",
        "UnifiedQA base, 10 sets (quoted)",
    ]
    assert [64, 77.07] in published.lines[0].get_xydata().tolist()
    assert not own.texts


def test_the_picture_is_saved_beside_the_page(page, tmp_path):
    page([record({}, "one", "1100"), record({"attention_k": 8}, "one", "1000")])
    assert (tmp_path / "qa.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither evaluations\.jsonl nor finetuning\.jsonl: make them with"):
        write_report(tmp_path, print)
