import json
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch

from tiny_models import write_published_t5
from topk_attention.calibrate import Calibration
from topk_experiments.models.pretrained import find_model, load_tokenizer
from topk_experiments.models.settings import Setting, one_at_a_time
from topk_experiments.qa import evaluation
from topk_experiments.qa.evaluation import EvaluationConfig, run_evaluation
from topk_experiments.qa.points import unpack
from topk_experiments.qa.tasks import read_questions
from topk_experiments.qa.tasks.unifiedqa import input_text, target_text
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.records import read_json_lines


@pytest.fixture
def config(decoder, colours, tmp_path):
    return EvaluationConfig(
        [str(colours)], one_at_a_time([4]), model=str(decoder), limit=10, shots=1, threads=1, out=tmp_path / "out"
    )


def answers_of(calls):
    return [[number for message in messages for number, _ in message["answers"]] for _, _, messages in calls]


def test_every_question_is_answered_once_in_full_and_with_k(config, in_this_process, console):
    records = run_evaluation(config, console)
    assert [sorted(numbers) for numbers in answers_of(in_this_process)] == [list(range(10))] * 2
    assert read_json_lines(config.out / "evaluations.jsonl") == records
    assert [record["setting"]["attention_k"] for record in records] == [None, 4]
    for record in records:
        for name, score in record["scores"].items():
            outcomes = unpack(record["outcomes"][name])
            assert len(outcomes) == 10
            assert score["value"] == pytest.approx(10 * sum(outcomes))
    full, topk = (record["lengths"] for record in records)
    assert "share_beyond_k" not in full
    assert topk["share_beyond_k"] == 1.0  # the example alone is longer than 4
    assert str(config.out.parent) not in (config.out / "evaluations.jsonl").read_text()
    assert not list((config.out / "work").glob("*.jsonl"))
    assert "accuracy by length" in console.export_text()


def test_with_every_key_kept_the_answers_are_those_of_the_full_model(config, in_this_process, console):
    full, same, fewer = run_evaluation(replace(config, settings=one_at_a_time([90, 1])), console)
    assert same["outcomes"] == full["outcomes"]
    likelihoods = [
        dict(answer for message in messages for answer in message["answers"]) for _, _, messages in in_this_process
    ]
    for number, expected in likelihoods[0].items():
        assert likelihoods[1][number] == pytest.approx(expected, abs=1e-4)
    assert likelihoods[2] != likelihoods[0]
    assert fewer["lengths"]["share_beyond_k"] == 1.0
    most = same["lengths"]["most_tokens"]
    note = f"k = 90 is full attention here: no query has more than {most} keys"
    assert " ".join(console.export_text().split()).count(note) == 1


def test_finished_points_are_kept_and_other_questions_are_another_point(config, in_this_process, console):
    records = run_evaluation(config, console)
    assert run_evaluation(config, console) == records
    assert len(in_this_process) == 2
    assert "on file, of " in console.export_text()
    for change in (
        {"limit": 9},
        {"shots": 0},
        {"seed": 1},
        {"settings": [Setting(attention_k=5)]},
        {"dtype": "bfloat16"},
        {"fresh": True},
    ):
        before = len(in_this_process)
        run_evaluation(replace(config, **change), console)
        assert len(in_this_process) > before, change


def test_in_bfloat16_likelihoods_are_those_of_float32_to_its_rounding(config, in_this_process, console):
    run_evaluation(config, console)
    records = run_evaluation(replace(config, dtype="bfloat16"), console)
    assert [record["run"]["dtype"] for record in records] == ["bfloat16"] * 2
    exact, _, rounded, _ = (
        dict(answer for message in messages for answer in message["answers"]) for _, _, messages in in_this_process
    )
    for number, expected in exact.items():
        assert rounded[number] != expected
        assert rounded[number] == pytest.approx(expected, rel=0.03)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got 'float16'"):
        replace(config, dtype="float16")


def test_an_interrupted_point_goes_on_with_the_questions_that_are_missing(
    config, in_this_process, console, monkeypatch
):
    expected = run_evaluation(replace(config, out=config.out / "whole"), console)
    in_this_process.clear()
    run = evaluation.run_in_fresh_process

    def interrupted(function, request, on_message):
        left = [2]

        def stop_after_two(message):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            on_message(message)

        return run(function, request, stop_after_two)

    monkeypatch.setattr(evaluation, "run_in_fresh_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(config, console)
    monkeypatch.setattr(evaluation, "run_in_fresh_process", run)
    records = run_evaluation(config, console)
    first, second, _ = answers_of(in_this_process)
    kept = [number for message in in_this_process[0][2][:2] for number, _ in message["answers"]]
    assert sorted(kept + second) == list(range(10))
    assert len(kept) < len(first)
    assert [record["outcomes"] for record in records] == [record["outcomes"] for record in expected]


def test_a_calibration_gives_every_head_its_own_k(config, in_this_process, console, tmp_path):
    path = tmp_path / "k.json"
    Calibration({"model.layers.0.self_attn": (3, 7)}, {"model.layers.0.mlp": 12}).save(path)
    attention, neurons = run_evaluation(replace(config, settings=one_at_a_time([path], [path], full=False)), console)
    assert in_this_process[0][1]["convert"]["attention_k"] == {"model.layers.0.self_attn": [3, 7]}
    assert in_this_process[1][1]["convert"]["feed_forward_k"] == {"model.layers.0.mlp": 12}
    described = attention["setting"]["attention_k"]
    assert (described["file"], described["mean_k"]) == ("k.json", 5.0)
    assert neurons["setting"]["feed_forward_k"]["mean_k"] == 12
    Calibration({"model.layers.0.self_attn": (3, 8)}).save(path)
    run_evaluation(replace(config, settings=[Setting(attention_k=path)]), console)
    assert len(in_this_process) == 3  # another content is another point
    with pytest.raises(ValueError, match=r"k\.json holds no feed-forward-k; calibrate with --feed-forward-mean-k"):
        run_evaluation(replace(config, settings=[Setting(feed_forward_k=path)]), console)


def test_completed_attention_is_a_point_of_its_own(config, in_this_process, console):
    run_evaluation(config, console)
    settings = one_at_a_time([4], completed_k=[4, 90])
    full, alone, completed, every = run_evaluation(replace(config, settings=settings), console)
    assert len(in_this_process) == 4  # the first two were on file
    asked = [request["convert"].get("completion") for _, request, _ in in_this_process]
    assert asked == [None, None, *[{"mass_scale": 1.0, "lift": 0.35}] * 2]
    assert completed["setting"] == alone["setting"] | {"completed": True}
    assert every["outcomes"] == full["outcomes"]
    first, second, third = (
        [answer for message in messages for answer in message["answers"]] for _, _, messages in in_this_process[:3]
    )
    assert first != second != third != first


def test_a_text_to_text_model_writes_its_answers(reading, in_this_process, console, tmp_path):
    config = EvaluationConfig([str(reading / "test.jsonl")], model=str(reading / "small-t5"), out=tmp_path)
    settings = one_at_a_time([2], [8], completed_k=[2])
    records = run_evaluation(replace(config, settings=settings, limit=5, threads=1), console)
    for record in records:
        assert set(record["scores"]) == {"exact_match", "f1"}
        assert record["protocol"]["reader"] == "text"
    assert records[1]["lengths"]["share_beyond_k"] == 1.0
    with pytest.raises(ValueError, match="shots must be 0 for small-t5, which takes no examples, got 2"):
        run_evaluation(replace(config, shots=2), console)


def test_a_t5_whose_tokenizer_is_a_sentencepiece_file_answers(reading, in_this_process, console, tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    questions = read_questions(reading / "test.jsonl").questions[:3]
    folder = write_published_t5(tmp_path / "published", [f"{input_text(q)} {target_text(q)}" for q in questions])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin", "spiece.model"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = load_tokenizer(find_model(str(folder)))
    for question in questions:
        assert tokenizer(question.passage)["input_ids"] == [*pieces.encode(question.passage), pieces.eos_id()]
    config = EvaluationConfig([str(reading / "test.jsonl")], one_at_a_time([4]), model=str(folder), limit=3, threads=1)
    records = run_evaluation(replace(config, out=tmp_path / "out"), console)
    assert [len(record["outcomes"]["exact_match"]) for record in records] == [3, 3]
    assert records[0]["protocol"]["reader"] == "text"


def test_a_question_longer_than_the_model_is_refused(config, in_this_process, console):
    with pytest.raises(ValueError, match=r"has a question of \d+ tokens with its examples, and tiny-llama takes 70"):
        run_evaluation(replace(config, shots=6), console)


def test_a_model_that_cannot_answer_is_refused(tmp_path, colours, in_this_process, console):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "bert")
    config = EvaluationConfig([str(colours)], model=str(tmp_path / "bert"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="a BertModel has no head yet that marks answers: train one with"):
        run_evaluation(config, console)


def test_a_point_that_fails_is_named(config, console, monkeypatch):
    def failing(*arguments, **options):
        raise WorkerError("out of memory", "cannot allocate memory")

    monkeypatch.setattr(evaluation, "run_in_fresh_process", failing)
    with pytest.raises(WorkerError, match=r"colours\.jsonl, full failed \(out of memory\): cannot allocate memory"):
        run_evaluation(config, console)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"shots": -1}, "shots must be at least 0, got -1"),
        ({"datasets": []}, "give at least one of datasets"),
        ({"settings": []}, "give at least one of settings"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(config, change, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **change)


def test_settings_refuse_what_is_no_k():
    with pytest.raises(ValueError, match="feed-forward-k must be at least 1 and below"):
        Setting(feed_forward_k=0)


def test_records_are_whole_lines_of_json(config, in_this_process, console):
    run_evaluation(config, console)
    for line in (config.out / "evaluations.jsonl").read_text().splitlines():
        assert json.loads(line)["schema"] == evaluation.SCHEMA
    assert torch.get_num_threads() == 1
