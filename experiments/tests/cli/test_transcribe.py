"""The command that transcribes a recording with several k, on a random Whisper of a dozen words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from topk_experiments.cli import app

soundfile = pytest.importorskip("soundfile", reason="soundfile, which reads audio files, is not installed")
runner = CliRunner()
SPECIAL = ["<unk>", "<|end|>", "<|start|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
LAST = "<|notimestamps|>"  # what follows it counts as a time
WORDS = ["a", "query", "keeps", "the", "keys", "that", "score", "best"]


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory):
    """Hears one second at a time."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    folder = tmp_path_factory.mktemp("models") / "tiny-whisper"
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, LAST])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=[*SPECIAL[2:], LAST],
    )
    wrapped.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400, hop_length=320).save_pretrained(folder)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(1)
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        num_mel_bins=8,
        max_source_positions=25,
        max_target_positions=20,
        init_std=0.8,
        **sizes,
        **heads,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
        max_length=20,
        is_multilingual=True,
        lang_to_id={"<|en|>": 3, "<|de|>": 4},
        task_to_id={"translate": 5, "transcribe": 6},
        no_timestamps_token_id=vocabulary[LAST],
        suppress_tokens=[0, *range(2, len(SPECIAL)), vocabulary[LAST]],
        no_repeat_ngram_size=2,
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tiny_whisper, tmp_path):
    """Two and a half windows of noise."""
    noise = np.random.default_rng(0).normal(size=40_000) * np.linspace(0, 0.3, 40_000)
    soundfile.write(tmp_path / "noise.wav", noise, 16_000)
    words = ["transcribe", "--model", tiny_whisper, "--audio", tmp_path / "noise.wav", "--out", tmp_path / "out"]
    return [str(word) for word in [*words, "--k", "1,50", "--threads", 1, "--language", "en"]]


@pytest.fixture
def one_process(monkeypatch):
    """What a fresh process would do, done here: five seconds less for each."""
    from topk_experiments.pretrained import transcription

    def run(function, request, on_message):
        assert function == "topk_experiments.pretrained.transcription:measure_transcript"
        return json.loads(json.dumps(transcription.measure_transcript(json.loads(json.dumps(request)), on_message)))

    monkeypatch.setattr(transcription, "run_in_fresh_process", run)


def test_transcripts_are_made_from_start_to_end_and_not_again(arguments, tmp_path, one_process):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    records = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    full, few, every = records
    assert [record["run"]["k"] for record in records] == [None, 1, 50]
    assert [record["num_converted_layers"] for record in records] == [0, 3, 3]
    assert set(full["transcript"].split()) <= set(WORDS)
    assert len(full["transcript"].split()) > 3
    assert every["transcript"] == full["transcript"]
    assert few["transcript"] != full["transcript"]
    assert full["audio_s"] == 2.5
    assert full["num_words"] == len(full["transcript"].split())
    assert full["word_errors"] == every["word_errors"] == 0 < few["word_errors"]
    assert all(record["elapsed_s"] > 0 and record["environment"]["torch"] for record in records)
    assert str(tmp_path) not in json.dumps(records)
    page = (out / "transcripts.md").read_text()
    assert f"| k = 50 (every key: full attention) | 0 of {len(full['transcript'].split())} (0.0 %) |" in page
    assert f"| {few['transcript']} |" in page

    again = runner.invoke(app, arguments)
    assert again.output.count("on file, of ") == 3
    more = runner.invoke(app, [*arguments, "--k", "1,2,50"])
    assert more.output.count("on file, of ") == 3
    assert len((out / "transcripts.jsonl").read_text().splitlines()) == 4


def test_completed_transcripts_stand_below_the_others_with_the_error_of_the_encoder(arguments, tmp_path, one_process):
    result = runner.invoke(app, [*arguments, "--completed-k", "1,50"])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    full, few, every, completed, all_completed = map(json.loads, (out / "transcripts.jsonl").read_text().splitlines())
    assert completed["run"] == few["run"] | {"completed": True}
    assert "encoder" not in full
    for record in (every, all_completed):
        assert record["transcript"] == full["transcript"]
        assert record["encoder"]["cosine"] == pytest.approx(1, abs=1e-5)
        assert record["encoder"]["relative_error"] < 1e-5
    assert few["encoder"] != completed["encoder"]
    for record in (few, completed):
        assert -1 < record["encoder"]["cosine"] < 1 - 1e-5
        assert record["encoder"]["relative_error"] > 1e-5
    page = (out / "transcripts.md").read_text()
    names = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    same = "k = 50 (every key: full attention)"
    assert names == [
        "| attention",
        "| full attention",
        "| k = 1",
        f"| {same}",
        "| k = 1, completed",
        f"| {same}, completed",
    ]
    assert f" | - | - | {full['elapsed_s']:.1f} | " in page
    assert f" | {few['encoder']['cosine']:.3f} | {few['encoder']['relative_error']:.3f} | " in page


def test_a_transcript_that_repeats_itself_is_cut_in_the_page():
    from topk_experiments.pretrained.transcription_report import as_markdown

    run = {"model": {"name": "tiny"}, "audio": "a.wav", "layers": ["cross"], "threads": 1}
    here = {"torch": "2", "date": "2026-11-30", "commit": "abc", "num_cpus": 2}
    numbers = {"audio_s": 1.0, "elapsed_s": 1.0, "other_cores": 0.0, "num_converted_layers": 1, "num_words": 2}

    def record(k, transcript):
        return {"run": run | {"k": k}, "environment": here, "transcript": transcript, "word_errors": 0} | numbers

    page = as_markdown([record(None, "ask not"), record(9, "ask not ask not"[:14]), record(1, "soul my " * 90)])
    rows = [line.split(" | ")[-1] for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["ask not |", "ask not ask no |", "soul my soul ... |"]


def test_layers_without_the_encoder_leave_its_error_out(arguments, tmp_path, one_process):
    result = runner.invoke(app, [*arguments, "--layers", "cross", "--completed-k", "1"])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert not any("encoder" in record for record in records)
    assert (
        "| attention | words that differ | time [s] | transcript |" in (tmp_path / "out" / "transcripts.md").read_text()
    )


def test_a_failed_transcript_is_told_and_those_before_it_are_kept(arguments, tmp_path, monkeypatch):
    from topk_experiments.pretrained import transcription
    from topk_experiments.runs.process import WorkerError

    def measured(function, request, **options):
        if request["k"] == 50:
            raise WorkerError("out of memory", "cannot allocate memory")
        numbers = {"transcript": "a | b", "num_converted_layers": 3, "audio_s": 2.5, "peak_mib": 1.0}
        return numbers | {"elapsed_s": 1.0, "other_cores": 0.0}

    monkeypatch.setattr(transcription, "run_in_fresh_process", measured)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "error: k = 50 (every key: full attention) failed (out of memory): cannot allocate memory" in result.output
    assert len((tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/no/such/folder"], "error: model folder not found: /no/such/folder"),
        (["--audio", "/no/such/file.wav"], "error: audio file not found: /no/such/file.wav"),
        (["--k", "0"], "error: k must be at least 1"),
        (["--k", "8,8"], "error: k must not hold a number twice, got 8, 8"),
        (["--completed-k", "8,8"], "error: completed-k must not hold a number twice, got 8, 8"),
        (["--layers", "encoder,all"], "error: layers must be among encoder, cross, decoder, got all"),
        (["--layers", ""], "error: layers must name at least one of encoder, cross, decoder"),
        (["--threads", "0"], "error: threads must be at least 1, got 0"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, options, words):
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_model_that_hears_nothing_is_named_by_the_process_that_loads_it(arguments, tiny_model):
    result = runner.invoke(app, [*arguments, "--model", str(tiny_model)])
    assert result.exit_code == 2
    assert "model tiny-llama (" in result.output
    assert ") does not load as a speech recognition model" in result.output


def test_layers_are_told_apart():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from topk_attention import convert
    from topk_experiments.pretrained.transcription import layer_kind

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = WhisperConfig(vocab_size=20, d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes, **tokens)
    model = WhisperForConditionalGeneration(config)
    kinds = [layer_kind(entry.path, model.get_submodule(entry.path)) for entry in convert(model, attention_k=3).entries]
    assert kinds == ["encoder", "decoder", "cross"]
