"""Experts whose weights lie together: each token uses the k best neurons of each expert that it is routed to."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

from expert_models import EXPERTS, FAMILIES, MODEL, NEURONS, VOCABULARY, dense_experts, experts_of, tiny_moe
from topk_attention import MeanK, calibrate, convert, fit_stand_ins, unconvert
from topk_attention.convert import conversion
from topk_attention.convert.experts import TopKExperts
from topk_attention.functional import StandIn
from topk_attention.functional.observation import observed

K = 5
EXACT = {"rtol": 1e-9, "atol": 1e-10}
# The ways to hold experts, and to call them, that differ.
KINDS = ("mixtral", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "aria_text", "longcat_flash")


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def seen_calls(model, ids):
    """Logits, and the arguments and output of each module of experts."""
    calls = []
    handles = [
        module.register_forward_hook(lambda module, arguments, output: calls.append((module, arguments, output)))
        for module in experts_of(model).values()
    ]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    assert len(calls) == len(handles) > 0
    return logits, calls


def converted_experts_alone(model, k=K, **options):
    return convert(model, feed_forward_k=dict.fromkeys(experts_of(model), k), **options)


@pytest.mark.parametrize("k", ["all", NEURONS])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_neurons_the_output_is_the_originals(family, k, ids):
    model = tiny_moe(family)
    with torch.no_grad():
        expected = model(ids).logits
        report = converted_experts_alone(model, k)
        torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    reasons = {entry.reason for entry in report.replaced}
    assert reasons == {f"k = {k} of {NEURONS} neurons of each of {EXPERTS} experts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_uses_the_k_best_neurons_of_each_of_its_experts(family, ids):
    model = tiny_moe(family)
    in_full = model(ids).logits
    converted_experts_alone(model)
    logits, calls = seen_calls(model, ids)
    for module, arguments, output in calls:
        torch.testing.assert_close(output, dense_experts(module, arguments, K), **EXACT)
    assert not torch.allclose(logits, in_full, rtol=1e-3)


@pytest.mark.parametrize("by_neuron", [False, True], ids=["as usual", "by neuron"])
@pytest.mark.parametrize("family", KINDS)
def test_gradients_are_those_of_the_k_best_neurons(family, by_neuron, ids):
    model = tiny_moe(family).requires_grad_(not by_neuron)
    converted_experts_alone(model)
    _, ((module, arguments, _), *_) = seen_calls(model, ids)
    x, *routing = arguments
    routing = [part.detach().requires_grad_(part.is_floating_point()) for part in routing]
    x = x.detach().requires_grad_()
    weights = [p for name, p in module.named_parameters() if p.requires_grad and "router" not in name]
    wanted = [x, *(part for part in routing if part.requires_grad), *weights]
    assert bool(weights) != by_neuron
    gradients = []
    for output in (module(x, *routing), dense_experts(module, (x, *routing), K)):
        signs = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
        gradients.append(torch.autograd.grad((output * signs).sum(), wanted))
    torch.testing.assert_close(*gradients, **EXACT)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("family", KINDS)
def test_only_the_tokens_of_an_expert_are_computed_by_it(family, ids):
    model = tiny_moe(family)
    converted_experts_alone(model)
    rows = []
    with observed(lambda call, output: rows.append(call.x.shape[0])), torch.no_grad():
        model(ids)
    num_experts_per_token = 1 if family == "llama4_text" else 2
    most = ids.numel() * num_experts_per_token * len(experts_of(model))
    assert 0 < sum(rows) <= most
    if family != "longcat_flash":  # some of its experts compute nothing
        assert sum(rows) == most


def test_experts_without_tokens_are_left_out_and_get_a_gradient_of_zero(ids):
    model = tiny_moe("mixtral")
    converted_experts_alone(model)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(6, MODEL, dtype=torch.float64)
    output = experts(x, torch.tensor([[1, 2]]).expand(6, 2), torch.full((6, 2), 0.5, dtype=torch.float64))
    output.sum().backward()
    is_used = experts.gate_up_proj.grad.flatten(1).abs().amax(1) > 0
    assert is_used.tolist() == [False, True, True, False]
    empty = experts(x[:0], torch.zeros(0, 2, dtype=torch.int64), x[:0, :2])
    assert empty.shape == (0, MODEL)


@pytest.mark.parametrize("family", KINDS)
def test_a_converted_model_generates_what_the_whole_sequence_gives(family, ids):
    model = tiny_moe(family)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    converted_experts_alone(model, "all")
    assert torch.equal(model.generate(ids, **options), expected)
    converted_experts_alone(model)
    generated = model.generate(ids, **options)
    with torch.no_grad():
        assert torch.equal(model(generated).logits[:, -5:-1].argmax(-1), generated[:, -4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_an_ordinary_checkpoint_that_remembers_every_k(family, ids, tmp_path):
    model = tiny_moe(family).requires_grad_(family not in KINDS)  # frozen ones are stored by neuron, and saved so
    names = list(model.state_dict())
    in_full = model(ids).logits.detach()
    ks = {path: K + number for number, path in enumerate(experts_of(model))}
    convert(model, feed_forward_k=ks)
    expected = model(ids).logits.detach()
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, in_full, **EXACT)
        report = convert(loaded)
        assert {entry.path: entry.k for entry in report.replaced} == ks
        torch.testing.assert_close(loaded(ids).logits, expected, **EXACT)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize("family", KINDS)
def test_unconvert_gives_the_original_back(family, is_frozen, ids):
    model = tiny_moe(family).requires_grad_(not is_frozen)
    classes = {path: type(module) for path, module in model.named_modules()}
    attributes = {path: set(vars(module)) for path, module in experts_of(model).items()}
    with torch.no_grad():
        expected = model(ids).logits
        convert(model, feed_forward_k=K)
        convert(model, feed_forward_k=K + 1)
        unconvert(model)
        assert torch.equal(model(ids).logits, expected)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert {path: set(vars(module)) for path, module in experts_of(model).items()} == attributes
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("family", KINDS)
def test_weights_lie_as_usual_while_they_train_and_by_neuron_when_frozen(family, ids):
    model = tiny_moe(family)
    converted_experts_alone(model)
    assert all(p.is_contiguous() for p in model.parameters())
    expected = model(ids).logits.detach()
    converted_experts_alone(model.requires_grad_(False))
    for module in experts_of(model).values():
        weights = module.topk_form.weights(module)
        first = weights.gate_in if weights.w_in is None else weights.w_in
        assert first.stride(-1) == 1 == weights.w_out.stride(1)
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, "pickled"], ids=["copy", "pickle"])
@pytest.mark.parametrize("family", KINDS)
def test_copies_are_converted_and_independent(family, copied, ids, tmp_path):
    model = tiny_moe(family)
    converted_experts_alone(model)
    expected = model(ids).logits.detach()
    if copied == "pickled":
        torch.save(model, tmp_path / "model")
        twin = torch.load(tmp_path / "model", weights_only=False)
    else:
        twin = copied(model)
    torch.testing.assert_close(twin(ids).logits, expected, **EXACT)
    unconvert(model)
    torch.testing.assert_close(twin(ids).logits, expected, **EXACT)
    unconvert(twin)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, **EXACT)


def test_an_error_on_the_way_leaves_the_model_as_it_was(ids, monkeypatch):
    model = tiny_moe("mixtral").requires_grad_(False)
    expected, classes = model(ids).logits, [type(module) for module in model.modules()]

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_remember", fails)
    with pytest.raises(KeyboardInterrupt):
        convert(model, feed_forward_k=K)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(ids).logits, expected)


def test_hooks_on_experts_stay_and_act(ids):
    model = tiny_moe("mixtral")
    experts, seen = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda module, arguments: seen.append("before"))
    converted_experts_alone(model)
    experts.register_forward_hook(lambda module, arguments, output: 0 * output)
    with_zeros = model(ids).logits
    assert seen == ["before"]
    experts.gate_up_proj.data.zero_()
    torch.testing.assert_close(model(ids).logits, with_zeros)


def test_auxiliary_losses_and_their_routers_stay(ids):
    model = tiny_moe("mixtral", output_router_logits=True)
    expected = model(ids, labels=ids)
    convert(model, feed_forward_k="all")
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    torch.testing.assert_close(output.loss, expected.loss)


def test_the_implementation_that_transformers_is_told_does_not_matter(ids):
    model = tiny_moe("mixtral", torch.float32)
    converted_experts_alone(model)
    expected = model(ids).logits
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        assert torch.equal(model(ids).logits, expected)


def _hooked(experts):
    experts.act_fn = nn.SiLU()
    experts.act_fn.register_forward_hook(lambda module, arguments, output: 2 * output)


def _wrapped(experts):
    forward = experts.forward
    experts.forward = lambda *arguments: 2 * forward(*arguments)


def _parametrized(experts):
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())


def _in_eight_bits(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


def _of_a_type(experts):
    class Quantized(nn.Parameter):
        pass

    experts.down_proj = Quantized(experts.down_proj.data)


def _with_another_activation(experts):
    experts.act_fn = nn.Tanh()


def _spread(experts):
    experts._is_expert_parallel = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "act_fn has a forward hook"),
        (_wrapped, "MixtralExperts has a forward method of its own"),
        (_parametrized, "down_proj has a parametrization"),
        (_in_eight_bits, "down_proj is of torch.float8_e4m3fn, with which a top-k network does not calculate"),
        (_of_a_type, "down_proj is .*Quantized, no ordinary tensor"),
        (_with_another_activation, "what MixtralExperts does between gate and up has no top-k form"),
        (_spread, "MixtralExperts holds some of the experts, the others are in other processes"),
    ],
)
def test_experts_that_do_more_than_their_weights_say_are_skipped_with_the_reason(change, reason):
    model = tiny_moe("mixtral")
    change(model.model.layers[0].mlp.experts)
    report = convert(model, feed_forward_k=K)
    assert [entry.path for entry in report.replaced] == ["model.layers.1.mlp.experts"]
    with pytest.raises(ValueError, match=rf"layers that cannot be replaced .{reason}"):
        convert(model, feed_forward_k={"model.layers.0.mlp.experts": K})


def test_experts_that_compute_something_else_are_skipped_with_the_reason():
    model = tiny_moe("mixtral")

    class Scaled(type(model.model.layers[0].mlp.experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    class Broken(Scaled):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AttributeError("no such thing")

    model.model.layers[0].mlp.experts.__class__ = Scaled
    report = convert(model, feed_forward_k=K)
    assert [entry.reason for entry in report.skipped] == [
        "Scaled computes something else than its weights and its activation say"
    ]
    model.model.layers[0].mlp.experts.__class__ = Broken
    report = convert(model, feed_forward_k=K)
    assert [entry.reason for entry in report.skipped] == ["Broken could not be tried, AttributeError: no such thing"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "act_fn has a forward hook .*, since convert"),
        (_in_eight_bits, "down_proj is of torch.float8_e4m3fn"),
        (_of_a_type, "down_proj is .*Quantized, no ordinary tensor"),
    ],
)
def test_what_is_added_after_convert_and_cannot_act_is_refused(change, reason, ids):
    model = tiny_moe("mixtral")
    converted_experts_alone(model)
    change(model.model.layers[0].mlp.experts)
    with pytest.raises(RuntimeError, match=f"MixtralExperts is converted and its {reason}"):
        model(ids)


def test_a_parametrization_that_is_added_after_convert_acts(ids):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = tiny_moe("mixtral")
    converted_experts_alone(model)
    experts = model.model.layers[0].mlp.experts
    parametrize.register_parametrization(experts, "down_proj", Halved())
    output = model(ids).logits
    with pytest.raises(ValueError, match=r"must be what convert made of it, got .*Parametrized.*; undo that before"):
        unconvert(model)
    parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=True)
    torch.testing.assert_close(model(ids).logits, output, **EXACT)
    unconvert(model)


def test_experts_take_no_stand_in(ids):
    model, stand_in = tiny_moe("mixtral"), StandIn(torch.zeros(MODEL, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"stand_in for .*experts must be None, as it holds experts, of which each"):
        convert(model, feed_forward_k=K, stand_in=stand_in)
    with pytest.raises(
        ValueError, match=r"model must have a feed-forward layer other than experts, .* got experts alone"
    ):
        fit_stand_ins(model, [ids], feed_forward_k=K)


def test_stand_ins_are_fitted_to_the_other_networks_of_a_model_with_experts(ids):
    model = tiny_moe("qwen2_moe")
    stand_ins = fit_stand_ins(model, [ids], feed_forward_k=K, rank=0)
    assert sorted(stand_ins.stand_in) == [f"model.layers.{i}.mlp.shared_expert" for i in range(2)]
    report = convert(model, feed_forward_k=stand_ins)
    assert sorted(entry.path for entry in report.replaced) == sorted(stand_ins.feed_forward)
    assert set(experts_of(model)) < set(stand_ins.feed_forward)


@pytest.mark.parametrize("family", ["qwen2_moe", "jetmoe", "llama4_text"])
def test_calibration_measures_the_neurons_of_experts(family, ids):
    model = tiny_moe(family, torch.float32)
    calibration = calibrate(model, [ids], target=MeanK(4), feed_forward_target=MeanK(10))
    paths = experts_of(model)
    assert paths.keys() <= calibration.feed_forward.keys()
    assert all(1 <= calibration.feed_forward[path] <= NEURONS for path in paths)
    report = convert(model, feed_forward_k=calibration.feed_forward)
    assert paths.keys() <= {entry.path for entry in report.replaced}


def test_in_half_precision_the_sum_over_experts_is_kept_in_float32(ids):
    exact = tiny_moe("mixtral")
    expected = exact(ids).logits
    errors = []
    for k in (None, "all"):
        model = tiny_moe("mixtral", torch.bfloat16)
        if k is not None:
            convert(model, feed_forward_k=k)
        with torch.no_grad():
            errors.append(float((model(ids).logits.double() - expected).square().mean()))
    assert errors[1] < 1.5 * errors[0]


def _classes_of_experts():
    """Every class of the installed transformers whose experts can be handed to its own functions for experts."""
    models = importlib.import_module("transformers.models")
    for package in pkgutil.iter_modules(models.__path__):
        file = Path(next(iter(models.__path__))) / package.name / f"modeling_{package.name}.py"
        if not file.exists() or "@use_experts_implementation" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__ and hasattr(value, "_apply_gate"):
                yield value


def test_experts_of_every_class_that_transformers_has_are_converted_or_named(ids):
    from transformers.integrations.moe import batched_mm_experts_forward

    config = types.SimpleNamespace(
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), NEURONS),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), MODEL),
        **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
        mlp_hidden_act="relu",
        moe_latent_size=None,
        swiglu_limit=1.5,
        swiglu_alpha=1.702,
        post_norm_eps=1e-6,
        mlp_gate_softcap=2.0,
        mlp_up_softcap=2.0,
        _experts_implementation="eager",
    )
    refused, converted = set(), 0
    x = torch.randn(10, MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([[0, 2], [3, 1], [2, 3], [1, 0], [0, 3]] * 2)
    weights = torch.rand(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    model = tiny_moe("mixtral", num_hidden_layers=1)
    for kind in _classes_of_experts():
        torch.manual_seed(0)
        experts = kind(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        experts.double()
        model.model.layers[0].mlp.experts = experts
        with torch.no_grad():
            expected = batched_mm_experts_forward(experts, x, index, weights)
            try:
                convert(model, feed_forward_k="all")
            except ValueError:
                refused.add(kind.__name__)
                continue
            assert isinstance(experts, TopKExperts)
            # Beam's calculate their products in float32.
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if kind.__name__ == "BeamExperts" else EXACT
            torch.testing.assert_close(experts(x, index, weights), expected, **tolerance)
            convert(model, feed_forward_k=K)
            assert not torch.allclose(experts(x, index, weights), expected, rtol=1e-2)
        unconvert(model)
        converted += 1
    assert refused <= {"Inkling2Experts"}  # whose gates have a soft cap
    assert converted >= 3
    print(
        f"{converted} classes of experts converted, {sorted(refused)} refused, transformers {transformers.__version__}"
    )
