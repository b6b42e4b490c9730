"""A configuration whose runs take a second: short expressions, a small model, no dropout."""

import pytest

from topk_experiments.lra.configuration import read_config

TINY = """
[data]
task = "listops"
num_train = 48
num_validation = 20
num_test = 33
min_length = 8
max_length = 24

[model]
num_layers = 2
d_model = 16
num_heads = 2
d_attention = 16
d_ff = 24
dropout = 0.0
attention_dropout = 0.0

[training]
batch = 8
steps = 8
learning_rate = 0.003
warmup = 2
weight_decay = 0.01
gradient_norm = 1.0
evaluate_every = 3

[attention]
k = 4
num_features = 16
"""


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny(tiny_file):
    return read_config(str(tiny_file))
