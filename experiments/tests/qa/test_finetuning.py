import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from topk_attention.calibrate import Calibration
from topk_experiments.models.pretrained import load_model
from topk_experiments.models.settings import one_at_a_time
from topk_experiments.qa import evaluation, finetuning
from topk_experiments.qa.evaluation import EvaluationConfig, run_evaluation
from topk_experiments.qa.finetuning import Batches, FinetuningConfig, run_finetuning
from topk_experiments.qa.readers import READERS, TrainingExamples
from topk_experiments.qa.tasks import Question
from topk_experiments.runs.records import read_json, read_json_lines


@pytest.fixture
def config(reading, tmp_path):
    return FinetuningConfig(
        model=str(reading / "small-t5"),
        training=str(reading / "train.jsonl"),
        dataset=str(reading / "test.jsonl"),
        settings=one_at_a_time([2], [8]),
        from_scratch=True,
        steps=4,
        batch=6,
        learning_rate=1e-3,
        evaluate_every=2,
        curve_questions=3,
        threads=1,
        out=tmp_path / "out",
    )


def test_every_arm_is_trained_on_the_same_questions_scored_and_kept(config, in_this_process, console, tmp_path):
    config = replace(config, save=tmp_path / "models")
    records = run_finetuning(config, console)
    assert read_json_lines(config.out / "finetuning.jsonl") == records
    assert [record["setting"] for record in records] == [setting.describe() for setting in config.settings]
    for record in records:
        assert [point["step"] for point in record["curve"]] == [2, 4]
        assert len(record["outcomes"]["f1"]) == 12
        assert record["training"]["questions"]["number"] == 60
    assert len({record["curve"][0]["training_loss"] for record in records}) == 3  # k does matter
    assert not list((config.out / "work").iterdir())
    assert run_finetuning(config, console) == records
    assert len(in_this_process) == 3
    assert sorted(folder.name for folder in config.save.iterdir()) == [
        "small-t5-attention-k-2",
        "small-t5-feed-forward-k-8",
        "small-t5-full",
    ]


def test_a_model_saved_with_k_is_asked_and_trained_as_the_records_say(
    config, in_this_process, console, tmp_path, monkeypatch
):
    config = replace(config, settings=one_at_a_time([2], full=False), save=tmp_path / "models")
    (trained,) = run_finetuning(config, console)
    models = []

    def load(*arguments):
        models.append(load_model(*arguments))
        return models[-1]

    monkeypatch.setattr(evaluation, "load_model_to_run", load)
    saved = str(config.save / "small-t5-attention-k-2")
    asked = EvaluationConfig(
        [str(config.dataset)], one_at_a_time([2], [8]), model=saved, threads=1, out=tmp_path / "asked"
    )
    full, keys, neurons = run_evaluation(asked, console)
    assert keys["scores"] == trained["scores"]
    for record, model in zip((full, keys, neurons), models, strict=True):
        remembered = getattr(model.config, "topk_attention", {"attention_k": {}, "feed_forward_k": {}})
        for name, k in record["setting"].items():
            assert set(remembered[name].values()) == (set() if k is None else {k})
    again = replace(config, model=saved, settings=one_at_a_time([]), from_scratch=False, out=tmp_path / "again")
    run_finetuning(again, console)
    assert "topk_attention" not in read_json(config.save / "small-t5-attention-k-2-full" / "config.json")


def test_a_folder_with_the_model_of_another_training_is_never_replaced(config, in_this_process, console, tmp_path):
    config = replace(config, settings=one_at_a_time([2]), save=tmp_path / "models")
    records = run_finetuning(config, console)
    folder = config.save / "small-t5-full"
    weights = (folder / "model.safetensors").read_bytes()
    # A refusal comes before any training, also where the first arm's folder would be free.
    (config.save / "small-t5-attention-k-2").rename(tmp_path / "apart")
    for change in ({"seed": 1}, {"steps": 2}, {"fresh": True, "seed": 1}):
        other = replace(config, settings=config.settings[::-1], **change)
        with pytest.raises(ValueError, match="small-t5-full holds the model of another training; give another --save"):
            run_finetuning(other, console)
    assert len(in_this_process) == 2
    assert (folder / "model.safetensors").read_bytes() == weights
    (tmp_path / "apart").rename(config.save / "small-t5-attention-k-2")
    assert run_finetuning(config, console) == records
    run_finetuning(replace(config, fresh=True), console)  # the same training may be done again
    assert len(in_this_process) == 4


def test_a_folder_of_before_there_were_keys_is_that_of_the_record(config, in_this_process, console, tmp_path):
    config = replace(config, settings=one_at_a_time([]), save=tmp_path / "models")
    records = run_finetuning(config, console)
    (config.save / "small-t5-full" / "training.json").unlink()
    assert run_finetuning(config, console) == records
    with pytest.raises(ValueError, match="holds the model of another training"):
        run_finetuning(replace(config, out=tmp_path / "without-record"), console)


def test_two_arms_with_one_folder_are_refused(config, console, tmp_path):
    paths = [tmp_path / name / "novel.json" for name in ("first", "second")]
    for path, ks in zip(paths, [(3, 5), (4, 4)], strict=True):
        path.parent.mkdir()
        Calibration({"encoder.block.0.layer.0.SelfAttention": ks}).save(path)
    config = replace(config, settings=one_at_a_time(paths, full=False), save=tmp_path / "models")
    with pytest.raises(ValueError, match=r"two arms would be saved in .*calibrated-by-novel-mean-k-4; train them"):
        run_finetuning(config, console)


def test_with_every_key_and_neuron_training_is_that_of_the_full_model(config, in_this_process, console):
    full, keys, neurons = run_finetuning(replace(config, settings=one_at_a_time([500], [32])), console)
    for record in (keys, neurons):
        for ours, theirs in zip(record["curve"], full["curve"], strict=True):
            assert ours["training_loss"] == pytest.approx(theirs["training_loss"], rel=1e-4)


def test_an_interrupted_arm_goes_on_from_its_checkpoint_to_the_same_losses(
    config, in_this_process, console, monkeypatch, tmp_path
):
    config = replace(config, settings=one_at_a_time([2], full=False))
    (expected,) = run_finetuning(replace(config, out=tmp_path / "whole"), console)
    in_this_process.clear()
    point, points = finetuning._point, []

    def interrupted(*arguments):
        points.append(1)
        if len(points) == 2:
            raise KeyboardInterrupt
        return point(*arguments)

    monkeypatch.setattr(finetuning, "_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_finetuning(config, console)
    (record,) = run_finetuning(config, console)
    assert [[m["step"] for m in messages] for _, _, messages in in_this_process] == [[1, 2, 3], [3, 4]]
    losses = [[point["training_loss"] for point in some["curve"]] for some in (record, expected)]
    assert losses[0] == losses[1]
    assert record["outcomes"] == expected["outcomes"]


def test_position_biases_learn_at_a_rate_of_their_own(config, in_this_process, console, tmp_path):
    """AdamW's first step is its learning rate, whatever the gradient: after one step the tables tell the rate."""
    config = replace(config, settings=one_at_a_time([]), steps=1, warm_up_steps=0, falls=False)
    name, tables = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", {}
    for rate in (1.0, 5.0):
        folder = tmp_path / str(rate)
        (record,) = run_finetuning(replace(config, position_bias_rate=rate, save=folder, out=folder), console)
        assert record["training"].get("position_bias_rate", 1.0) == rate
        weights = load_file(folder / "small-t5-full" / "model.safetensors")
        tables[rate] = weights[name]
        tables[rate, "others"] = weights["shared.weight"]
    torch.manual_seed(config.seed)
    start = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(config.model)).state_dict()[name]
    slow, fast = (tables[rate] - start for rate in (1.0, 5.0))
    moved = slow.abs() > 0.5 * config.learning_rate  # no question is long enough for every distance
    assert moved.any()
    torch.testing.assert_close(fast[moved], 5 * slow[moved], rtol=1e-2, atol=1e-5)
    assert torch.equal(tables[1.0, "others"], tables[5.0, "others"])


def test_beta2_decides_after_the_first_step_and_is_recorded(config, in_this_process, console, tmp_path):
    config = replace(config, settings=one_at_a_time([]), warm_up_steps=0, evaluate_every=1, steps=3)
    (usual,) = run_finetuning(config, console)
    (other,) = run_finetuning(replace(config, beta2=0.5), console)
    assert "beta2" not in usual["training"]
    assert other["training"]["beta2"] == 0.5
    losses = [[point["training_loss"] for point in record["curve"]] for record in (usual, other)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)  # AdamW's first step is the same for any
    assert losses[0][2] != pytest.approx(losses[1][2], rel=1e-4)


def test_training_lowers_the_loss_of_a_small_t5(config, in_this_process, console):
    settings = one_at_a_time([], [16], full=False)
    (record,) = run_finetuning(replace(config, settings=settings, steps=60, evaluate_every=30, batch=8), console)
    first, last = (point["training_loss"] for point in record["curve"])
    assert last < 0.9 * first


def test_parts_of_a_batch_give_the_gradient_of_the_whole(reading):
    """Answers of several lengths: the loss is a mean over all their tokens."""
    model = AutoModelForSeq2SeqLM.from_pretrained(reading / "small-t5")
    tokenizer = AutoTokenizer.from_pretrained(reading / "small-t5")
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    questions = [Question("where?", (" ".join(words[: 1 + n]),), passage=" ".join(words[: 7 - n])) for n in range(5)]
    examples = READERS["text"].training(model, tokenizer, questions)
    assert examples.weights == [2, 3, 4, 5, 6]  # </s> is a token too
    gradients = []
    for parts in (1, 3):
        model.zero_grad()
        for loss in Batches(examples, 5, parts, seed=0)(2):
            loss.backward()
        gradients.append(model.shared.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_parts_are_of_like_length_and_differ_in_size_by_one_at_most():
    lengths = [5, 90, 6, 80, 7, 70, 8, 60]
    parts = []
    examples = TrainingExamples(
        lengths, [1] * 8, lambda numbers: parts.append([lengths[n] for n in numbers]) or torch.ones(())
    )
    weights = [loss.item() for loss in Batches(examples, 8, 3, seed=0)(1)]
    assert parts == [[5, 6], [7, 8, 60], [70, 80, 90]]
    assert weights == pytest.approx([2 / 8, 3 / 8, 3 / 8])


def test_an_epoch_holds_every_example_once_and_any_step_can_be_made_at_once():
    examples = TrainingExamples(range(10), [1] * 10, lambda numbers: torch.zeros(()))
    batches = Batches(examples, 4, 1, seed=0)
    numbers = [number for step in range(1, 6) for number in batches.numbers(step)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert Batches(examples, 4, 1, seed=0).numbers(4) == numbers[12:16]
    assert Batches(examples, 4, 1, seed=1).numbers(1) != numbers[:4]


@pytest.fixture
def bert(tmp_path, reading):
    """Folder of a random BERT without a span head, with the words of the reading task."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(reading / "small-t5")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=400, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_span_head_is_trained_on_passages_apart_from_those_it_is_asked_about(
    bert, tmp_path, in_this_process, console
):
    passages = ["the red hat is in the den", "a blue hat was on the bed", "no hat is in the box", "one hat fell"]
    rows = [
        {"question": "where?", "context": text, "answers": {"text": [text[-7:]], "answer_start": [len(text) - 7]}}
        for text in passages
        for _ in range(3)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(rows))
    config = FinetuningConfig(
        model=str(bert), training=str(path), hold_out=0.25, settings=one_at_a_time([3]), steps=2, batch=4,
        evaluate_every=1, threads=1, out=tmp_path / "out", save=tmp_path / "models",
    )  # fmt: skip
    full, topk = run_finetuning(config, console)
    assert full["training"]["questions"]["number"] == 9
    assert full["questions"]["number"] == len(full["outcomes"]["f1"]) == 3
    assert full["curve"] != topk["curve"]
    request = in_this_process[0][1]
    asked, learned = ({q["passage"] for q in request[name]} for name in ("evaluation", "training"))
    assert not asked & learned
    evaluated = EvaluationConfig([str(path)], model=str(config.save / "bert-full"), threads=1, out=tmp_path / "out")
    (record,) = run_evaluation(evaluated, console)
    assert record["protocol"]["reader"] == "spans"
    with pytest.raises(ValueError, match="position_bias_rate is for models with relative position biases"):
        run_finetuning(replace(config, position_bias_rate=5.0, save=None), console)


def test_a_decoder_is_refused(config, decoder, console):
    with pytest.raises(ValueError, match="tiny-llama is a decoder model: fine-tuning is for text-to-text and span"):
        run_finetuning(replace(config, model=str(decoder)), console)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"parts": 7}, "parts must be at most the batch of 6, got 7"),
        ({"learning_rate": 0.0}, r"learning_rate must be above 0, got 0\.0"),
        ({"position_bias_rate": 0.0}, r"position_bias_rate must be above 0, got 0\.0"),
        ({"beta2": 1.0}, r"beta2 must be at least 0 and below 1, got 1\.0"),
        ({"settings": []}, "there is nothing to train"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(config, change, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **change)
