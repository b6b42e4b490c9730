import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from topk_attention import convert
from topk_experiments.models.settings import Setting, convert_model


@pytest.mark.parametrize(
    ("setting", "ks"),
    [
        (Setting(), {}),
        (Setting(attention_k=3), {"attention_k": 3}),
        (Setting(feed_forward_k=5), {"feed_forward_k": 5}),
    ],
    ids=str,
)
def test_a_model_saved_with_k_runs_with_what_the_setting_says_and_remembers_that_alone(setting, ks, tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 5.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=30, **sizes)).eval()
    ids = torch.arange(2, 14)[None]

    def output_of(model):
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids).logits

    convert(model, attention_k=2, feed_forward_k=4)
    model.save_pretrained(tmp_path / "saved")
    saved, loaded = output_of(model), AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved").eval()
    convert_model(loaded, setting.for_convert(), "auto")
    original = T5ForConditionalGeneration(T5Config(vocab_size=30, **sizes)).eval()
    original.load_state_dict(loaded.state_dict())
    if ks:
        convert(original, **ks)
    torch.testing.assert_close(output_of(loaded), output_of(original))
    assert not torch.allclose(output_of(loaded), saved)
    remembered = getattr(loaded.config, "topk_attention", {"attention_k": {}, "feed_forward_k": {}})
    for name in ("attention_k", "feed_forward_k"):
        assert set(remembered[name].values()) == ({ks[name]} if name in ks else set())
