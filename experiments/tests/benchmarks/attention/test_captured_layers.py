import pytest
import torch

from topk_attention import topk_attention
from topk_experiments.benchmarks.attention.methods import OPERATION, new_inputs, score_product, why_not
from topk_experiments.benchmarks.attention.works import LayerWork, Work, new_work
from topk_experiments.benchmarks.error.capture import dense_attention
from topk_experiments.runs.turns import check

NUM_HEADS, NUM_KEY_HEADS, LENGTH, HEAD_DIM = 6, 2, 48, 8
NAMED = {"layer": 3, "model": "tiny", "revision": "1", "text": "book.txt", "text_sha256": "0"}


@pytest.fixture
def layer(tmp_path):
    """A file as `benchmark error` captures it, each query head with keys of its own, and those of layer 3."""
    query = torch.randn(1, NUM_HEADS, LENGTH, HEAD_DIM)
    grouped = [torch.randn(1, NUM_KEY_HEADS, LENGTH, HEAD_DIM) for _ in range(2)]
    key, value = (tensor.repeat_interleave(NUM_HEADS // NUM_KEY_HEADS, 1) for tensor in grouped)
    tensors = {"query": query, "key": key, "value": value, "output": dense_attention(query, key, value).float()}
    others = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    torch.save({"0": others, "3": tensors}, tmp_path / "captured.pt")
    return tmp_path / "captured.pt", tensors


def work_of(path, **changes):
    sizes = {"num_heads": NUM_HEADS, "num_key_heads": NUM_KEY_HEADS, "length": LENGTH, "head_dim": HEAD_DIM, "k": 5}
    return LayerWork(**(sizes | NAMED | {"is_causal": True, "captured": str(path)} | changes))


def test_grouped_keys_give_the_layers_own_output(layer):
    path, tensors = layer
    query, key, value = new_inputs(work_of(path))
    assert key.shape == value.shape == (1, NUM_KEY_HEADS, LENGTH, HEAD_DIM)
    output = topk_attention(query, key, value, k=LENGTH, is_causal=True, enable_gqa=True, backend="reference")
    torch.testing.assert_close(output, tensors["output"])


@pytest.mark.parametrize("method", ["topk-chunked", "sdpa", "query-chunks"])
def test_exact_methods_pass_the_check_on_a_layer(layer, method):
    assert check(OPERATION, method, work_of(layer[0])) < 1e-5


def test_a_shorter_work_takes_the_first_tokens(layer):
    path, tensors = layer
    query, *_ = new_inputs(work_of(path, length=10))
    assert torch.equal(query, tensors["query"][:, :, :10])


def test_the_floor_multiplies_all_heads_of_a_layer(layer):
    work = work_of(layer[0])
    score_product(work, new_inputs(work))()


def test_a_record_identifies_the_layer_and_not_the_file(layer):
    work = work_of(layer[0])
    assert "captured" not in work.as_record()
    assert new_work(**work.as_record()) == work
    assert new_work(**work.as_record()) != work_of(layer[0], layer=0)


def test_works_of_random_float32_tensors_are_recorded_as_ever():
    work = Work(length=64, k=5)
    assert list(work.as_record()) == ["num_heads", "length", "k", "is_causal", "bias", "dropout_p", "head_dim"]
    assert new_work(**work.as_record()) == work
    half = Work(length=64, k=5, dtype="bfloat16")
    assert new_work(**half.as_record()) == half != work


def test_performer_is_left_out_with_the_reason(layer):
    assert why_not("performer", work_of(layer[0])) == "Performer is measured on random float32 tensors alone"
