"""Fine-tuning a converted model: Trainer, accelerate, checkpoints, and the model that comes back in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset

from convert_models import FAMILIES, VOCABULARY, inputs_of, output_of
from topk_attention import convert, unconvert

pytest.importorskip("accelerate")
FAMILY_NAMES = ("llama", "gpt2", "t5", "bart", "bert")


class Sentences(Dataset):
    def __init__(self, is_seq2seq: bool) -> None:
        self.tokens = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(5))
        self.is_seq2seq = is_seq2seq

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(12, dtype=torch.long)
        if self.is_seq2seq:
            mask[9:] = 0
        return {"input_ids": self.tokens[index], "attention_mask": mask, "labels": self.tokens[index]}


# Initial weights of T5 this small keep eight steps from amplifying rounding.
NO_DROPOUT: dict[str, dict[str, float]] = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0, "initializer_factor": 0.3},
    "bart": {"dropout": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def language_model(name, k=4, neurons=8, **options):
    if name == "bert":
        from transformers import BertForMaskedLM

        torch.manual_seed(0)
        model = BertForMaskedLM(FAMILIES["bert"].build(**options).config)
    else:
        model = FAMILIES[name].build(**options)
    model.config.use_cache = False
    if k is not None:
        convert(model, attention_k=k, feed_forward_k=neurons)
    return model


def train(model, folder, *, is_seq2seq, resume=None, **options):
    """Losses of eight steps, a checkpoint after four."""
    from transformers import Trainer, TrainingArguments

    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "dataloader_pin_memory": False,
    } | options
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=Sentences(is_seq2seq))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_trainer_resumes_from_a_checkpoint_with_the_same_losses(name, tmp_path):
    is_seq2seq = name in ("t5", "bart")
    straight = train(language_model(name), tmp_path, is_seq2seq=is_seq2seq)
    assert len(straight) == 8
    checkpoint = tmp_path / "checkpoint-4"
    fresh = type(language_model(name)).from_pretrained(checkpoint)
    convert(fresh)  # every k from the checkpoint's configuration
    resumed = train(fresh, tmp_path, is_seq2seq=is_seq2seq, resume=str(checkpoint))
    assert resumed == pytest.approx(straight, rel=1e-5)
    assert len(set(straight)) == 8


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradient_checkpointing_in_trainer_gives_the_same_losses(name, tmp_path):
    is_seq2seq = name in ("t5", "bart")
    plain = train(language_model(name), tmp_path / "plain", is_seq2seq=is_seq2seq)
    model = language_model(name)
    less_memory = train(model, tmp_path / "less", is_seq2seq=is_seq2seq, **activation_checkpointing())
    assert model.is_gradient_checkpointing
    assert less_memory == pytest.approx(plain, rel=1e-5)


def activation_checkpointing():
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    return {"activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing": True}


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_with_every_key_and_neuron_kept_trainer_sees_the_losses_of_the_original(name, tmp_path):
    """Eight steps, in float32 and under bfloat16 autocast, where rounding alone moves the original's by up to 1.2 %."""
    losses = {}
    for kept in (None, 1000):
        for is_half in (False, True):
            model = language_model(name, k=kept, neurons=kept, **NO_DROPOUT[name])
            folder = tmp_path / f"{kept}-{is_half}"
            losses[kept, is_half] = train(model, folder, is_seq2seq=name in ("t5", "bart"), bf16=is_half)
    assert losses[1000, False] == pytest.approx(losses[None, False], rel=1e-4)
    # How much depends on the processor's bfloat16 units as well.
    rounding = max(abs(half / single - 1) for half, single in zip(losses[None, True], losses[None, False], strict=True))
    assert losses[1000, True] == pytest.approx(losses[None, True], rel=max(0.01, 3 * rounding))
    assert losses[1000, True] != losses[1000, False]
    assert losses[1000, True] != losses[None, True]  # another way to compute the same


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_bfloat16_autocast_in_trainer_goes_its_own_way_below_the_limit(name, tmp_path):
    """Rounding lets each step keep some other keys and neurons; training continues nevertheless."""
    full = train(language_model(name), tmp_path / "full", is_seq2seq=name in ("t5", "bart"))
    half = train(language_model(name), tmp_path / "half", is_seq2seq=name in ("t5", "bart"), bf16=True)
    assert half != full
    assert half == pytest.approx(full, rel=0.25)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_accelerate_saves_and_restores_a_run(name, mixed_precision, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first Accelerator

    def prepared():
        model = language_model(name).eval()
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    batch = torch.utils.data.default_collate([Sentences(False)[i] for i in range(4)])

    def steps(accelerator, model, optimizer):
        losses = []
        for _ in range(3):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    run = prepared()
    steps(*run)
    run[0].save_state(str(tmp_path))
    expected = steps(*run)
    other = prepared()
    other[0].load_state(str(tmp_path))
    assert steps(*other) == pytest.approx(expected, rel=1e-5)
    assert steps(*prepared()) != pytest.approx(expected, rel=1e-5)


IN_A_FRESH_PROCESS = """
import sys, torch, transformers
from topk_attention import convert, unconvert
torch.set_num_threads(1)
for folder, model_class in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, model_class).from_pretrained(folder).eval()
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        convert(model)
        converted = model(**inputs)[0]
        unconvert(model)
        torch.save((converted, model(**inputs)[0], sorted(model.state_dict())), f"{folder}/outputs.pt")
"""


def test_fine_tuned_models_compute_the_same_in_a_fresh_process_converted_and_unconverted(tmp_path):
    models, arguments = {}, [sys.executable, "-c", IN_A_FRESH_PROCESS]
    for name, family in FAMILIES.items():
        model, inputs, folder = family.build(), inputs_of(family, torch.float32), tmp_path / name
        models[name] = (model, inputs, sorted(model.state_dict()))
        convert(model, attention_k=4, feed_forward_k=8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            output_of(model, inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        arguments += [str(folder), type(model).__name__]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, (model, inputs, names) in models.items():
        converted, unconverted, names_there = torch.load(tmp_path / name / "outputs.pt")
        with torch.no_grad():
            torch.testing.assert_close(converted, model(**inputs)[0], msg=lambda text, name=name: f"{name}: {text}")
            unconvert(model)
            torch.testing.assert_close(unconverted, model(**inputs)[0], msg=lambda text, name=name: f"{name}: {text}")
        assert names_there == names
