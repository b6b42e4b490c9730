"""Fixtures: models small enough to run a whole command in seconds, and a text for them."""

import pytest
import torch

from tiny_models import write_tiny_llama

WORDS = ["a", "query", "keeps", "the", "keys", "that", "score", "best", "and", "leaves", "all", "others", "out"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random Llama with a tokenizer of a dozen words."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return write_tiny_llama(folder, WORDS, num_hidden_layers=2, max_position_embeddings=512)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, tiny_model):
    """Folder of a random BERT with the same words between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    size = tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", size - 2), ("[SEP]", size - 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story <1>.txt"
    path.write_text(" ".join(WORDS * 30))
    return path
