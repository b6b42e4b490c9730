"""Whatever is raised inside `convert` or `unconvert`, wherever, the model is as it was."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from convert_models import FAMILIES, inputs_of, output_of, tiny_llama
from topk_attention import Completion, convert, unconvert
from topk_attention.convert import conversion, sites

FOLDERS = tuple(str(Path(conversion.__file__).parents[1] / folder) for folder in ("convert", "nn"))
# Not there: what puts the model back, and the trials, whose errors are reasons to skip a layer.
EXEMPT = {"restore", "all_or_nothing", "__init__", "convert", "unconvert", "_is_plain", "is_activation"}
# Runs of each family with a failure: the first step, the last one, and others evenly between them.
FAILURES = 24
NAMES = ("t5", "bert", "gpt2", "llama", "bart", "vit")


def torch_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


def steps_until_failure(call, fail_at, error):
    """Run the call and raise `error` at the step of this number, a line of the package; returns the number of steps."""
    steps = 0

    def trace(frame, event, _):
        nonlocal steps
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return None
        if event == "line" and frame.f_code.co_name not in EXEMPT:
            steps += 1
            if steps == fail_at:
                raise error
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(former)
    return steps


def picture_of(model):
    """Everything about a model that a conversion could change, in a form that compares."""
    modules = dict(model.named_modules(remove_duplicate=False))
    configs = {id(m.config): m.config for m in modules.values() if hasattr(m, "config")}
    return (
        {path: (id(m), type(m), m.training, sorted(vars(m))) for path, m in modules.items()},
        {
            path: [list(map(id, h.values())) for n, h in vars(m).items() if "hooks" in n and h]
            for path, m in modules.items()
        },
        {name: (id(p), p.data_ptr(), p.stride(), p.requires_grad) for name, p in model.named_parameters()},
        {key: (config._attn_implementation, str(config.to_dict())) for key, config in configs.items()},
        list(model.state_dict()),
    )


def build(name):
    model = torch_encoder() if name == "torch" else FAMILIES[name].build()
    inputs = {"src": torch.randn(2, 9, 24)} if name == "torch" else inputs_of(FAMILIES[name], torch.float32)
    return model, lambda: model(**inputs) if name == "torch" else output_of(model, inputs)


def assert_every_failure_leaves_it(model, compute, call):
    before, values = picture_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = compute()
    twin = copy.deepcopy(model)
    numbers = steps_until_failure(lambda: call(twin), 0, None)
    assert numbers > 50
    for i in range(FAILURES):
        fail_at = 1 + i * (numbers - 1) // (FAILURES - 1)
        error = (KeyboardInterrupt(), MemoryError(), RuntimeError("at this step"))[i % 3]
        with pytest.raises(type(error)):
            steps_until_failure(lambda: call(model), fail_at, error)
        assert picture_of(model) == before, f"step {fail_at} of {numbers}"
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(compute(), expected)


@pytest.mark.parametrize("name", [*NAMES, "torch"])
def test_a_failure_at_any_step_of_convert_leaves_the_model_as_it_was(name):
    model, compute = build(name)
    assert_every_failure_leaves_it(model, compute, lambda model: convert(model, attention_k=3, feed_forward_k=5))
    convert(model, attention_k=3, feed_forward_k=5)
    fresh, _ = build(name)
    convert(fresh, attention_k=3, feed_forward_k=5)
    for path, module in fresh.named_modules():
        assert type(model.get_submodule(path)) is type(module)


@pytest.mark.parametrize("name", ["t5", "bert", "bart", "torch"])
def test_a_failure_at_any_step_of_a_second_convert_or_of_unconvert_leaves_the_converted_model(name):
    model, compute = build(name)
    convert(model, attention_k=3, feed_forward_k=5)
    assert_every_failure_leaves_it(model, compute, unconvert)
    only_last = {"attention_k": 4, "feed_forward_k": 6, "where": lambda path, module: "1" in path}
    assert_every_failure_leaves_it(model, compute, lambda model: convert(model, **only_last))
    unconvert(model)
    original, _ = build(name)
    for path, module in original.named_modules():
        assert type(model.get_submodule(path)) is type(module)


@pytest.mark.parametrize("name", ["t5", "llama", "torch"])
def test_a_failure_at_any_step_leaves_a_model_without_half_a_completion(name):
    model, compute = build(name)
    completed = {"attention_k": 3, "completion": Completion([0.5, 1, 2, 3])}
    assert_every_failure_leaves_it(model, compute, lambda model: convert(model, **completed))
    convert(model, **completed)
    assert_every_failure_leaves_it(model, compute, unconvert)
    assert_every_failure_leaves_it(model, compute, lambda model: convert(model, attention_k=3))


@pytest.mark.parametrize("fail_at", range(1, 7))
def test_memory_that_runs_out_while_weights_are_stored_by_neuron_leaves_the_former_order(fail_at, monkeypatch):
    model = tiny_llama().requires_grad_(False)
    strides, calls = [p.stride() for p in model.parameters()], []
    store = sites.store_by_neuron

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise MemoryError
        store(*args, **kwargs)

    monkeypatch.setattr(sites, "store_by_neuron", fails)
    with pytest.raises(MemoryError):
        convert(model, attention_k=3, feed_forward_k=5)
    assert [p.stride() for p in model.parameters()] == strides
    monkeypatch.undo()
    convert(model, attention_k=3, feed_forward_k=5)
    assert [p.stride() for p in model.parameters()] != strides


def test_an_error_of_transformers_half_way_through_the_parts_of_a_model_leaves_all_of_them(tokens, monkeypatch):
    from transformers import PreTrainedModel

    model, inputs = FAMILIES["t5"].build(), inputs_of(FAMILIES["t5"])
    before = picture_of(model)
    with torch.no_grad():
        expected = output_of(model, inputs)
    change = PreTrainedModel.set_attn_implementation

    def half(self, implementation):
        change(self, implementation)
        raise RuntimeError("half way")

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", half)
    with pytest.raises(RuntimeError, match="half way"):
        convert(model, attention_k=3, feed_forward_k=5)
    assert picture_of(model) == before
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), expected)


def test_models_that_share_one_configuration_object_are_converted_alone(tokens):
    teacher = tiny_llama()
    student = type(teacher)(teacher.config).eval()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        expected = teacher(tokens).logits
        convert(student, attention_k=3, feed_forward_k=5)
        assert teacher.config._attn_implementation == "sdpa"
        assert not hasattr(teacher.config, "topk_attention")
        assert torch.equal(teacher(tokens).logits, expected)
        converted = student(tokens).logits
        assert not torch.equal(converted, expected)
        twin = type(teacher)(student.config).eval()
        twin.load_state_dict(teacher.state_dict())
        convert(twin)
        unconvert(twin)
        assert torch.equal(twin(tokens).logits, expected)
        assert torch.equal(student(tokens).logits, converted)
    assert all(module.config is student.config for module in student.modules() if hasattr(module, "config"))
