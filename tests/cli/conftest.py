"""A language model small enough to run the whole demo in seconds."""

import pytest
from tiny_models import write_tiny_llama

WORDS = ["a", "query", "keeps", "the", "keys", "that", "score", "best", "and", "leaves", "all", "others", "out"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random Llama with a tokenizer of a dozen words."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return write_tiny_llama(folder, WORDS, num_hidden_layers=2, max_position_embeddings=512)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story <1>.txt"
    path.write_text(" ".join(WORDS * 30))
    return path
