import pytest
import torch

from topk_experiments.models.sentence_embedding import embedding_error, embedding_of, first_windows, hidden_states
from topk_experiments.models.text import Text

WORDS = ["a", "query", "keeps", "the", "best", "keys"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each word, between [CLS] and [SEP] as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[CLS]", "[SEP]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def model():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(config).eval()


def text_of(*words):
    return Text(" ".join(words), "words.txt")


def test_windows_follow_one_another_between_special_tokens(tokenizer):
    text = text_of(*WORDS, *WORDS[::-1])
    windows, num_characters = first_windows(text, tokenizer, 2, 6)
    assert windows == [[0, 3, 4, 5, 6, 1], [0, 7, 8, 8, 7, 1]]
    assert text.content[:num_characters].split() == [*WORDS, "keys", "best"]


def test_a_window_that_is_not_full_is_left_out(tokenizer):
    with pytest.raises(
        ValueError, match=r"words\.txt is too short: 2 windows of 6 tokens needed, it has 1; give a longer"
    ):
        first_windows(text_of(*WORDS), tokenizer, 2, 6)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_windows_need_room_beside_the_special_tokens(tokenizer, num_tokens):
    with pytest.raises(ValueError, match=rf"tokens must be at least 3 \(2 of them are special\), got {num_tokens}"):
        first_windows(text_of(*WORDS), tokenizer, 1, num_tokens)


def test_an_embedding_is_the_mean_of_real_tokens_at_length_one(model):
    ids = torch.tensor([[0, 3, 4, 5, 1], [0, 6, 1, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
        ours = embedding_of(output, mask)
    for row, length in enumerate((5, 3)):
        mean = output[0][row, :length].mean(0)
        torch.testing.assert_close(ours[row], mean / mean.norm())


def test_hidden_states_are_the_same_in_any_batches_and_progress_rises(model):
    windows = [[0, *(3 + (first + step) % 6 for step in range(4)), 1] for first in range(5)]
    seen = []
    one = hidden_states(model, windows, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    torch.testing.assert_close(one, hidden_states(model, windows, batch_size=5))
    with torch.no_grad():
        torch.testing.assert_close(one, model(input_ids=torch.tensor(windows))[0])


def test_the_error_is_the_mean_distance():
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert embedding_error(expected, expected) == 0
    assert embedding_error(-expected, expected) == 2
    assert embedding_error(torch.tensor([[0.6, 0.8], [0.0, 1.0]]), expected) == pytest.approx(0.8**0.5 / 2)
