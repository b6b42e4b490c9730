import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from topk_attention import Calibration, Completion, convert
from topk_experiments.models.settings import Setting, convert_model


@pytest.mark.parametrize(
    ("setting", "ks"),
    [
        (Setting(), {}),
        (Setting(attention_k=3), {"attention_k": 3}),
        (Setting(feed_forward_k=5), {"feed_forward_k": 5}),
        (Setting(attention_k=3, completed=True), {"attention_k": 3, "completion": Completion()}),
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
    completed = setting.describe().get("completed", False)
    assert bool(remembered.get("completion")) == completed == ("completion" in ks)


def test_settings_of_before_completion_are_described_as_they_were():
    settings = [Setting(), Setting(attention_k=3), Setting(feed_forward_k=5)]
    assert [setting.describe() for setting in settings] == [
        {"attention_k": None, "feed_forward_k": None},
        {"attention_k": 3, "feed_forward_k": None},
        {"attention_k": None, "feed_forward_k": 5},
    ]


def test_a_calibration_brings_its_completion_or_takes_the_default(tmp_path):
    path = tmp_path / "novel.json"
    Calibration({"layer": (3, 7)}).save(path)
    alone, completed = Setting(attention_k=path), Setting(attention_k=path, completed=True)
    assert "completion" not in alone.for_convert() | alone.describe()
    assert completed.for_convert()["completion"] == {"mass_scale": 1.0, "lift": 0.35}
    assert str(completed) == "attention calibrated by novel, mean k = 5, completed"
    Calibration({"layer": (3, 7)}, completion={"layer": Completion((1.0, 0.5), lift=0.2)}).save(path)
    for setting in (alone, completed):
        assert setting.for_convert()["completion"] == {"layer": {"mass_scale": [1.0, 0.5], "lift": 0.2}}
        assert setting.describe()["completed"] is True


def test_completion_without_an_attention_k_is_refused():
    with pytest.raises(ValueError, match="completed needs an attention-k"):
        Setting(feed_forward_k=5, completed=True)
