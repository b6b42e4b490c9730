"""`topk-attention generate`: what it writes, what it reads again in a conversation, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from model_fixtures import WORDS
from tiny_models import write_tiny_llama
from topk_attention import Completion, MeanK, calibrate, convert
from topk_attention.cli import app

runner = CliRunner()
PROMPT = " ".join(WORDS * 3)
_TEMPLATE = "{% for m in messages %}{{ 'query' if m.role == 'user' else 'keys' }} {{ m.content }} {% endfor %}out"


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that attends sharply, with a chat template."""
    folder = write_tiny_llama(
        tmp_path_factory.mktemp("models") / "talker",
        WORDS,
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.6,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def generate(folder):
    def run(*options, messages=None):
        arguments = ["generate", "--model", folder, "--max-new-tokens", 12, "--threads", 1, *options]
        return runner.invoke(app, [str(argument) for argument in arguments], input=messages)

    return run


def expected(folder, text, **how):
    """What transformers' own generate writes after a text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if how:
        convert(model, **how)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ([], {}),
        (["--attention-k", "all"], {}),
        (["--attention-k", "3"], {"attention_k": 3}),
        (["--attention-k", "3", "--completed"], {"attention_k": 3, "completion": Completion()}),
    ],
)
def test_it_continues_the_prompt_as_transformers_does(generate, folder, tmp_path, options, how):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    result = generate("--prompt-file", path, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(folder, PROMPT, **how) + "\n"
    assert re.search(r"^prompt 39 tokens in .* tokens/s\); then 11 tokens in .* tokens/s\); peak memory", result.stderr)


def test_k_changes_what_is_written(generate):
    full, few = (generate("--prompt", PROMPT, *options).stdout for options in ([], ["--attention-k", "1"]))
    assert full != few


@pytest.mark.filterwarnings("ignore:the target leaves no key out")
def test_it_takes_a_calibration_with_its_completion(generate, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    calibration = calibrate(model, [ids], target=MeanK(2), completion="fit")
    calibration.save(tmp_path / "k.json")
    wanted = expected(folder, PROMPT, attention_k=calibration)
    assert wanted != expected(folder, PROMPT, attention_k=calibration, completion=Completion(mass_scale=9.0))
    for options in ([], ["--completed"]):
        result = generate("--prompt", PROMPT, "--attention-k", tmp_path / "k.json", *options)
        assert result.stdout == wanted + "\n", result.output


def test_a_k_of_every_token_is_named(generate):
    assert "attention-k: k = 200 is full attention here" in generate("--prompt", PROMPT, "--attention-k", 200).stderr
    assert "full attention" not in generate("--prompt", PROMPT, "--attention-k", 3).stderr


@pytest.mark.parametrize("options", [[], ["--attention-k", "3"]])
def test_a_conversation_reads_only_what_is_new_and_answers_as_if_it_read_all(generate, folder, options):
    result = generate("--chat", *options, messages=f"{PROMPT}\nkeys score\n\nbest\n/exit\nthe\n")
    assert result.exit_code == 0, result.output
    answers = result.stdout.splitlines()
    assert len(answers) == 3  # of no empty line, and of nothing after /exit
    how = {"attention_k": 3} if options else {}
    conversation = ""
    for message, answer in zip((PROMPT, "keys score", "best"), answers, strict=True):
        conversation += f"query {message} "
        assert answer == expected(folder, f"{conversation}out", **how)
        conversation += f"keys {answer} "
    read = [int(number) for number in re.findall(r"^prompt (\d+) tokens", result.stderr, re.MULTILINE)]
    assert read[0] == 41
    assert max(read[1:]) < 25


def test_a_conversation_ends_with_its_input_and_may_begin_with_a_prompt(generate, folder):
    result = generate("--chat", "--prompt", PROMPT, messages="")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(folder, f"query {PROMPT} out") + "\n"


def test_samples_depend_on_the_seed_alone(generate):
    texts = [generate("--prompt", PROMPT, "--temperature", 2, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_the_file_of_a_model_asks_for_does_not_keep_its_text_from_coming(generate, folder, tmp_path, asked):
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    (copied / "generation_config.json").write_text(json.dumps(asked))
    options = ("--chat", "--attention-k", 3)
    result = generate(*options, "--model", copied, messages="keeps the\nquery that\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == generate(*options, messages="keeps the\nquery that\n").stdout
    assert "full attention" not in result.stderr


def test_weights_may_be_of_lower_precision(generate):
    result = generate("--prompt", PROMPT, "--dtype", "bfloat16", "--attention-k", 3)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "error: prompt is missing: give --prompt, --prompt-file or --chat"),
        (["--prompt", "a", "--prompt-file", "b"], "error: give one of --prompt and --prompt-file, got both"),
        (["--prompt", " "], "error: prompt must not be empty"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--prompt", "a", "--attention-k", "0"], "error: attention-k must be at least 1 and below 2^31, got 0"),
        (["--prompt", "a", "--attention-k", "k.json"], 'error: attention-k must be a number, "all" or the file of a'),
        (["--prompt", "a", "--attention-k", ""], "calibration, got '': no such file"),
        (["--prompt", "a", "--attention-k", "."], "calibration, got '.': this is a folder"),
        (["--prompt", "a", "--attention-k", "²"], "calibration, got '²': no such file"),
        (["--prompt", "a", "--attention-k", "++3"], "calibration, got '++3': no such file"),
        (["--prompt", "a", "--backend", "chunked"], "error: backend 'chunked' needs an --attention-k"),
        (["--prompt", "a", "--completed"], "error: completed needs an --attention-k: with every key kept there is"),
        (["--prompt", "a", "--dtype", "int8"], "error: dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--prompt", "a", "--temperature", "0"], "error: temperature must be above 0 and finite, got 0; leave it out"),
        (["--prompt", "a", "--max-new-tokens", "0"], "error: max-new-tokens must be at least 1, got 0"),
        (["--prompt", "a " * 245], "error: prompt must have at most 244 tokens, the longest input of"),
        (["--prompt", "a", "--model", "/no/such/model"], "error: /no/such/model does not load as a transformers model"),
        (["--prompt", "a", "--backend", "gpu", "--attention-k", "1"], "error: backend must be one of"),
        (["--prompt", "a", "--gguf-file", "none.gguf"], "does not load as a transformers model"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(generate, options, words):
    result = generate(*options)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""


def test_a_model_without_a_chat_template_is_refused(tiny_model):
    result = runner.invoke(app, ["generate", "--model", str(tiny_model), "--chat"])
    assert result.exit_code == 2
    assert "error: chat needs a model with a chat template" in result.stderr
