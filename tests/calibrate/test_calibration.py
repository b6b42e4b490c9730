import json

import pytest
import torch

from convert_models import FAMILIES, HEADS, LAYERS, NEURONS, inputs_of, tiny_bert, tiny_llama, tiny_mistral
from topk_attention import (
    Calibration,
    Completion,
    LossIncrease,
    LostMass,
    MeanK,
    calibrate,
    convert,
    fit_completion,
    unconvert,
)
from topk_attention.calibrate.statistics import Collector

LENGTH = 24
KS = (1, 2, 4, 8)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (2, LENGTH), generator=generator) for _ in range(2)]


def paths(model):
    return [path for path, module in model.named_modules() if path.endswith(("self_attn", "attention.self"))]


def state(model):
    """Everything about a model that calibrating could leave changed."""
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "modules": [(path, type(module), module.training) for path, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "values": [parameter.tolist() for parameter in model.parameters()],
    }


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("target", [MeanK(8), LostMass(0.01)])
def test_each_head_of_each_layer_gets_a_k(make_model, target, batches):
    model = make_model()
    calibration = calibrate(model, batches, target=target)
    assert list(calibration) == paths(model)
    assert len(calibration) == LAYERS
    assert all(len(ks) == HEADS and all(1 <= k <= LENGTH for k in ks) for ks in calibration.values())
    assert len({k for ks in calibration.values() for k in ks}) > 1
    assert calibration.feed_forward == {}
    assert calibration.about["tokens"] == 4 * LENGTH
    if isinstance(target, MeanK):
        assert 0.8 * target.mean_k <= calibration.mean_k <= target.mean_k


def test_a_target_that_leaves_every_key_to_every_head_is_named_as_full_attention(batches):
    words = f"no key out in any head: k = {LENGTH} is full attention here: no query has more than {LENGTH} keys"
    with pytest.warns(UserWarning, match=words):
        calibrate(tiny_bert(), batches, target=MeanK(LENGTH))


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(make_model, training, batches):
    model = make_model().train(training)
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    next(module for module in model.modules() if isinstance(module, torch.nn.Dropout | torch.nn.Linear)).train(
        not training
    )
    before = state(model)
    calibrate(model, batches, target=MeanK(8), feed_forward_target=MeanK(16))
    assert state(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_calibrated(name):
    family = FAMILIES[name]
    model, batch = family.build(), inputs_of(family, torch.float32)
    before = state(model)
    with torch.no_grad():
        calibration = calibrate(model, [batch], target=MeanK(4), feed_forward_target=MeanK(10))
    assert state(model) == before
    assert len(calibration) == family.num_attention
    assert len(calibration.feed_forward) == family.num_networks
    assert all(curves.loss_error[:, 0].sum() > 0 for curves in calibration.curves.values())
    report = convert(model, attention_k=calibration, feed_forward_k=calibration.feed_forward)
    assert not report.skipped


def test_a_searched_calibration_gives_the_model_back_too(batches):
    model = tiny_llama().train()
    before = state(model)
    calibrate(model, batches, target=LossIncrease(0.05))
    assert state(model) == before


def test_the_model_comes_back_as_it_was_after_an_error(batches):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(IndexError):
        calibrate(model, [batches[0] + 1000], target=MeanK(8))
    assert state(model) == before


def test_a_model_loaded_with_topk_attention_keeps_it(tmp_path, batches):
    from transformers import LlamaForCausalLM

    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="topk")
    calibrate(model, batches, target=MeanK(8))
    assert model.config._attn_implementation == "topk"


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_bert])
def test_converting_with_a_calibration_is_remembered_by_a_checkpoint(make_model, tmp_path, batches):
    model = make_model()
    calibration = calibrate(model, batches, target=MeanK(8), feed_forward_target=MeanK(16))
    report = convert(model, attention_k=calibration, feed_forward_k=calibration.feed_forward)
    found = {entry.path: entry.k for entry in report.replaced if entry.kind == "attention"}
    assert found == dict(calibration)
    output = model(batches[0])[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    restored = convert(loaded)
    assert [(entry.path, entry.k) for entry in restored.replaced] == [(e.path, e.k) for e in report.replaced]
    torch.testing.assert_close(loaded(batches[0])[0], output)
    unconvert(model)
    assert not torch.allclose(model(batches[0])[0], output, atol=1e-3)


def test_a_budget_of_every_key_changes_nothing(batches):
    model = tiny_llama()
    expected = model(batches[0]).logits
    calibration = calibrate(model, batches, target=MeanK(LENGTH))
    convert(model, attention_k=calibration)
    assert (model(batches[0]).logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_loss_measured_is_the_models_own(batches):
    model = tiny_llama()
    with torch.no_grad():
        expected = sum(model(input_ids=ids, labels=ids).loss.item() for ids in batches) / len(batches)
    assert calibrate(model, batches, target=MeanK(8)).about["loss"] == pytest.approx(expected, rel=1e-5)


def test_heads_are_weighed_by_the_gradient_of_the_summed_loss(batches, monkeypatch):
    model, ids = tiny_llama(), batches[0]
    expected = {}
    handles = []
    for path in paths(model):

        def keep(module, inputs, path=path):
            inputs[0].register_hook(lambda grad: expected.update({path: grad}))  # [B, N, H * E]

        handles.append(model.get_submodule(path).o_proj.register_forward_pre_hook(keep))
    (model(input_ids=ids, labels=ids).loss * ids.numel()).backward()
    for handle in handles:
        handle.remove()

    seen = {}
    see = Collector.see_attention

    def see_and_keep(self, path, call, grad):
        seen[path] = grad.transpose(1, 2).flatten(2)
        see(self, path, call, grad)

    monkeypatch.setattr(Collector, "see_attention", see_and_keep)
    calibrate(model, [ids], target=MeanK(8))
    assert set(seen) == set(expected)
    for path, grad in seen.items():
        torch.testing.assert_close(grad, expected[path], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_bert])
def test_padding_is_measured_as_if_it_were_not_there(make_model, batches):
    model = make_model()
    ids = batches[0][:1]
    expected = calibrate(model, [{"input_ids": ids}], target=LostMass(0.1))
    mask = torch.ones(1, LENGTH + 8, dtype=torch.long)
    mask[0, LENGTH:] = 0
    padded = torch.cat([ids, ids[:, :8]], dim=1)
    calibration = calibrate(model, [{"input_ids": padded, "attention_mask": mask}], target=LostMass(0.1))
    if make_model is tiny_llama:
        assert calibration.about["loss"] == pytest.approx(expected.about["loss"], rel=1e-4)
    for path in expected:
        # Gradients of padded rows are zero, so the mean falls by their share alone; the sum stays.
        ours, theirs = calibration.curves[path], expected.curves[path]
        ratio = torch.stack(
            [ours.loss_error[:, ours.ks.index(k)] / theirs.loss_error[:, theirs.ks.index(k)] for k in KS]
        )
        torch.testing.assert_close(ratio / ratio[0, 0], torch.ones_like(ratio), rtol=1e-2, atol=0)


def test_sliding_windows_are_measured(batches):
    model = tiny_mistral()
    calibration = calibrate(model, batches, target=LostMass(0.01))
    assert max(k for ks in calibration.values() for k in ks) <= 8  # a window of 7 keys, and the grid's next k


def test_no_square_mask_is_kept_for_the_backward_pass(monkeypatch):
    length, kept = 1100, []
    sample = Collector.sample

    def sample_and_keep(self, call, number):
        sampled = sample(self, call, number)
        kept.append((call.attn_mask.numel(), sampled.call.attn_mask))
        return sampled

    monkeypatch.setattr(Collector, "sample", sample_and_keep)
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    calibrate(tiny_mistral(), [ids], target=LostMass(0.01), queries_per_head=20)
    assert sum(whole for whole, _ in kept) >= LAYERS * length**2
    assert all(mask.untyped_storage().nbytes() <= 25 * length for _, mask in kept)


def test_batches_of_any_order_and_length_give_the_same(batches):
    model = tiny_llama()
    short, long = batches[0][:, :9], batches[1]
    calibration = calibrate(model, [short, long], target=MeanK(20))
    assert calibration == calibrate(model, iter([long, short]), target=MeanK(20))
    assert calibration.curves[paths(model)[0]].ks[-1] == LENGTH


def test_a_mapping_gives_the_same_as_its_token_ids(batches):
    model = tiny_llama()
    by_ids = calibrate(model, batches, target=MeanK(8))
    assert by_ids == calibrate(model, [{"input_ids": ids, "labels": ids} for ids in batches], target=MeanK(8))


def test_progress_rises_to_its_end(batches):
    seen = []
    calibrate(tiny_llama(), batches, target=LossIncrease(0.1), progress=lambda *step: seen.append(step))
    measuring = [(done, total) for what, done, total in seen if what == "measuring"]
    assert measuring == [(step, 4 * LAYERS) for step in range(1, 4 * LAYERS + 1)]
    searching = [(done, total) for what, done, total in seen if what == "searching"]
    assert searching == [(step, searching[0][1]) for step in range(searching[0][1] + 1)]


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("target", [MeanK(12), LostMass(0.2)])
def test_feed_forward_layers_get_a_k_each(make_model, target, batches):
    model = make_model()
    calibration = calibrate(model, batches, target=MeanK(8), feed_forward_target=target)
    assert len(calibration.feed_forward) == LAYERS
    assert all(isinstance(k, int) and 1 <= k <= NEURONS for k in calibration.feed_forward.values())
    if isinstance(target, MeanK):
        assert sum(calibration.feed_forward.values()) <= LAYERS * 12
    report = convert(model, feed_forward_k=calibration.feed_forward)
    assert {entry.path: entry.k for entry in report.replaced} == calibration.feed_forward


@pytest.fixture(scope="module")
def trained():
    """A Llama that has learnt to repeat the token five places back, which needs few keys but the right ones."""
    model = tiny_llama(initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = repeated(generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def repeated(generator, batch=8):
    return torch.randint(3, 97, (batch, 5), generator=generator).repeat(1, 6)


def loss_of(model, batches):
    with torch.no_grad():
        return sum(model(input_ids=ids, labels=ids).loss.item() for ids in batches) / len(batches)


@pytest.mark.parametrize("bound", [0.3, 0.02])
def test_a_search_keeps_the_loss_within_its_bound(trained, bound):
    texts = [repeated(torch.Generator().manual_seed(1))]
    full = loss_of(trained, texts)
    calibration = calibrate(trained, texts, target=LossIncrease(bound))
    assert calibration.about["loss"] == pytest.approx(full, rel=1e-4)
    convert(trained, attention_k=calibration)
    try:
        assert loss_of(trained, texts) - full <= bound + 1e-4
    finally:
        unconvert(trained)
    search = calibration.about["search"]
    smaller = [step for step in search if step["mean_k"] < 0.99 * calibration.mean_k]
    assert all(step["loss_increase"] > bound for step in smaller)


def test_a_tighter_bound_on_the_loss_needs_no_smaller_k(trained):
    texts = [repeated(torch.Generator().manual_seed(1))]
    loose, tight = (calibrate(trained, texts, target=LossIncrease(bound)).mean_k for bound in (0.5, 0.01))
    assert loose <= tight


def test_a_calibration_is_a_mapping_that_convert_takes():
    calibration = Calibration({"a": (1, 2), "b": (3, 4)})
    assert dict(calibration) == {"a": (1, 2), "b": (3, 4)}
    assert calibration["b"] == (3, 4)
    assert len(calibration) == 2
    assert "a" in calibration
    assert calibration.mean_k == 2.5
    with pytest.raises(KeyError):
        calibration["c"]


def test_a_saved_calibration_loads_as_it_was(tmp_path, batches):
    calibration = calibrate(tiny_llama(), batches, target=MeanK(8), feed_forward_target=MeanK(16))
    calibration.save(tmp_path / "k.json")
    loaded = Calibration.load(str(tmp_path / "k.json"))
    assert loaded == calibration
    assert loaded.feed_forward == calibration.feed_forward
    assert loaded.about == calibration.about
    for stored, curves in (
        (loaded.curves, calibration.curves),
        (loaded.feed_forward_curves, calibration.feed_forward_curves),
    ):
        assert list(stored) == list(curves)
        for path in curves:
            assert stored[path].ks == curves[path].ks
            assert stored[path].num_rows == curves[path].num_rows
            torch.testing.assert_close(stored[path].lost_mass, curves[path].lost_mass, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(stored[path].loss_error, curves[path].loss_error, rtol=1e-3, atol=0)
            torch.testing.assert_close(stored[path].loss_change, curves[path].loss_change, rtol=1e-3, atol=0)
    assert loaded.reallocated(LostMass(0.1)) == calibration.reallocated(LostMass(0.1))


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("completion", ["fit", Completion(), Completion(2.0, lift=0.1)])
def test_a_completion_comes_with_the_k_and_convert_applies_both(make_model, completion, batches):
    model = make_model()
    before = state(model)
    calibration = calibrate(model, batches, target=MeanK(8), completion=completion)
    assert state(model) == before
    assert list(calibration.completion) == list(calibration)
    assert all(len(one.mass_scale) == HEADS for one in calibration.completion.values())
    report = convert(model, attention_k=calibration)
    for entry in report.replaced:
        assert entry.k == calibration[entry.path]
        assert entry.completion.mass_scale == calibration.completion[entry.path].mass_scale
        assert entry.completion.lift == calibration.completion[entry.path].lift
    if completion != "fit":
        assert f"completed ({completion})" in str(report)  # the scale of all heads, said once
    completed = model(batches[0])[0]
    convert(model, attention_k=dict(calibration))
    assert not torch.allclose(model(batches[0])[0], completed, atol=1e-3)
    if completion != "fit":
        convert(model, attention_k=dict(calibration), completion=completion)
        torch.testing.assert_close(model(batches[0])[0], completed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_calibrated_with_completion(name):
    family = FAMILIES[name]
    model, batch = family.build(), inputs_of(family, torch.float32)
    before = state(model)
    calibration = calibrate(model, [batch], target=MeanK(4), completion="fit")
    assert state(model) == before
    assert len(calibration.completion) == family.num_attention
    assert not convert(model, attention_k=calibration).skipped


def test_curves_with_completion_are_of_any_order_of_batches(batches):
    model = tiny_llama()
    short, long = batches[0][:, :9], batches[1]
    one = calibrate(model, [short, long], target=MeanK(12), completion="fit")
    other = calibrate(model, [long[:1], short, long[1:]], target=MeanK(12), completion="fit")
    assert one == other
    assert {path: c.mass_scale for path, c in one.completion.items()} == {
        path: c.mass_scale for path, c in other.completion.items()
    }


def test_a_fitted_scale_leaves_no_larger_error_than_0_or_1_on_the_text(batches):
    model = tiny_llama(initializer_range=0.3)
    fitted, one, alone = (
        calibrate(model, batches, target=MeanK(8), completion=completion).curves
        for completion in ("fit", Completion(), None)
    )
    for path, curves in fitted.items():
        assert (curves.loss_error <= one[path].loss_error * (1 + 1e-6)).all()
        assert (curves.loss_error <= alone[path].loss_error * (1 + 1e-6)).all()
        torch.testing.assert_close(curves.lost_mass, alone[path].lost_mass)


def test_a_bound_on_lost_mass_takes_the_same_k_with_completion(batches):
    model = tiny_llama()
    plain, completed = (
        calibrate(model, batches, target=LostMass(0.1), completion=completion) for completion in (None, "fit")
    )
    assert plain == completed
    assert not plain.completion
    assert completed.completion


def test_scales_are_fitted_for_k_that_are_given(batches):
    model = tiny_llama()
    before = state(model)
    fitted = fit_completion(model, batches, attention_k=4)
    assert state(model) == before
    assert dict(fitted) == dict.fromkeys(paths(model), (4,) * HEADS)
    assert not convert(model, attention_k=fitted).skipped
    unconvert(model)
    again = calibrate(model, batches, target=MeanK(8), completion="fit")
    for path, curves in again.curves.items():
        at = curves.ks.index(4)
        assert list(fitted.completion[path].mass_scale) == curves.mass_scale[:, at].tolist()
    assert fitted.reallocated(MeanK(8)) == again


def test_scales_are_fitted_for_the_layers_that_have_a_k_alone(batches):
    model = tiny_llama()
    first, second = paths(model)
    fitted = fit_completion(model, batches, attention_k={first: "all", second: [1, 2, 3, 4]})
    assert dict(fitted) == {second: (1, 2, 3, 4)}
    assert list(fitted.completion) == [second]


def test_a_search_with_completion_needs_fewer_keys(trained):
    texts = [repeated(torch.Generator().manual_seed(1))]
    plain, completed = (
        calibrate(trained, texts, target=LossIncrease(0.3), completion=completion) for completion in (None, "fit")
    )
    assert completed.completion
    assert completed.mean_k <= plain.mean_k
    full = loss_of(trained, texts)
    convert(trained, attention_k=completed)
    try:
        assert loss_of(trained, texts) - full <= 0.3 + 1e-4
    finally:
        unconvert(trained)


@pytest.mark.parametrize("completion", ["fit", Completion(2.0)])
def test_a_saved_completion_loads_as_it_was(tmp_path, batches, completion):
    calibration = calibrate(tiny_llama(), batches, target=MeanK(8), completion=completion)
    calibration.save(tmp_path / "k.json")
    loaded = Calibration.load(tmp_path / "k.json")
    assert loaded == calibration
    for path, one in calibration.completion.items():
        assert loaded.completion[path].mass_scale == one.mass_scale
        assert loaded.completion[path].lift == one.lift
    other = loaded.reallocated(MeanK(4))
    assert other == calibration.reallocated(MeanK(4))
    for path, one in calibration.reallocated(MeanK(4)).completion.items():
        assert other.completion[path].mass_scale == pytest.approx(one.mass_scale, rel=1e-3)


def test_a_file_says_whether_it_needs_a_version_that_completes(tmp_path, batches):
    """An earlier version would take the k and leave out what completes them."""
    for completion, version in ((None, 2), ("fit", 3)):
        calibrate(tiny_llama(), batches, target=MeanK(8), completion=completion).save(tmp_path / "k.json")
        content = json.loads((tmp_path / "k.json").read_text())
        assert content["version"] == version
        assert ("completion" in content) == (completion is not None)


@pytest.mark.parametrize("completion", ["best", 1.0, True])
def test_a_completion_of_another_kind_is_named(batches, completion):
    with pytest.raises(TypeError, match='completion must be "fit", a Completion or None, got '):
        calibrate(tiny_llama(), batches, target=MeanK(8), completion=completion)


def test_fitting_scales_where_every_key_is_kept_is_refused(batches):
    with pytest.raises(ValueError, match="attention_k must leave keys out in a layer at least, got all keys"):
        fit_completion(tiny_llama(), batches, attention_k="all")


def test_a_calibration_without_curves_has_no_other_targets():
    with pytest.raises(ValueError, match="this calibration has no curves"):
        Calibration({"a": (1, 2)}).reallocated(MeanK(4))


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no json", '{"version": 1}', '{"version": 2, "attention_k": []}', '"x"']
)
def test_another_file_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a calibration file: "):
        Calibration.load(path)


def test_a_number_that_no_json_parser_takes_is_never_written(tmp_path, batches):
    calibrate(tiny_llama(), batches, target=MeanK(8)).save(tmp_path / "k.json")

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "k.json").read_text(), parse_constant=refuse)


def test_measurements_are_spent_anew_for_another_target(batches):
    model = tiny_llama()
    calibration = calibrate(model, batches, target=MeanK(8))
    other = calibration.reallocated(MeanK(4))
    assert other == calibrate(model, batches, target=MeanK(4))
    assert other.about == calibration.about | {"target": repr(MeanK(4))}
    assert calibration.reallocated(LostMass(0.1)) == calibrate(model, batches, target=LostMass(0.1))
    assert calibration.mean_k > other.mean_k


def test_a_search_cannot_be_spent_anew(batches):
    calibration = calibrate(tiny_llama(), batches, target=MeanK(8))
    with pytest.raises(ValueError, match=r"LossIncrease is searched with the model: call calibrate"):
        calibration.reallocated(LossIncrease(0.1))


def test_no_batches_are_named():
    with pytest.raises(ValueError, match="batches must hold at least one batch of token ids, got none"):
        calibrate(tiny_llama(), [], target=MeanK(8))


def test_a_converted_model_is_named(batches):
    model = tiny_llama()
    convert(model, attention_k=4)
    with pytest.raises(ValueError, match=r"model was converted already; call topk_attention\.unconvert\(model\) first"):
        calibrate(model, batches, target=MeanK(8))


def test_a_module_that_is_no_transformers_model_is_named(batches):
    with pytest.raises(TypeError, match="model must be a transformers model"):
        calibrate(torch.nn.Linear(2, 2), batches, target=MeanK(8))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (64, TypeError, "target must be MeanK, LostMass or LossIncrease, got int"),
        (
            MeanK(25),
            ValueError,
            "mean_k must be at most 24, the tokens of the longest batch.* got 25",
        ),
    ],
)
def test_a_bad_target_is_named_and_leaves_the_model_alone(target, error, message, batches):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(error, match=message):
        calibrate(model, batches, target=target)
    assert state(model) == before


@pytest.mark.parametrize("number", [0.5, 0, -1, float("nan")])
def test_a_target_out_of_range_cannot_be_made(number):
    with pytest.raises(ValueError, match=f"mean_k must be at least 1, got {number:g}"):
        MeanK(number)
    with pytest.raises(ValueError, match="bound must be a share of the mass between 0 and 1, got"):
        LostMass(2 * number)
    with pytest.raises(ValueError, match=r"bound must be above 0 nats per token, got"):
        LossIncrease(-abs(number))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.long), TypeError, "batches must be a list of batches, got one Tensor"),
        ({"input_ids": torch.zeros(2, 8)}, TypeError, "batches must be a list of batches, got one dict"),
        ("a text", TypeError, "batches must be a list of batches, got one str"),
        (["a text"], TypeError, r"batches\[0\] must be token ids .* got str; a tokenizer makes them from text"),
        ([torch.zeros(8, dtype=torch.long)], ValueError, r"batches\[0\] must have shape \[B, N\], got \[8\]; give it"),
        ([torch.zeros(2, 8)], TypeError, r"batches\[0\] must hold whole numbers, got torch.float32"),
        ([{"input_ids": torch.zeros(2, 8)}], TypeError, r"batches\[0\]\['input_ids'\] must hold whole numbers"),
        (
            [{"ids": torch.zeros(2, 8)}],
            TypeError,
            r"batches\[0\] must hold a tensor under one of .* got ids",
        ),
        ([], ValueError, "batches must hold at least one batch of token ids, got none"),
    ],
)
def test_wrong_batches_are_refused_before_the_model_reads_one(batches, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_llama(), batches, target=MeanK(2))


def test_layers_that_share_a_network_get_a_k_each(batches):
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    calibration = calibrate(model, batches, target=MeanK(8), feed_forward_target=MeanK(16))
    assert list(calibration.feed_forward) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_bad_feed_forward_target_is_named(batches):
    with pytest.raises(TypeError, match="feed_forward_target must be MeanK or LostMass, got LossIncrease"):
        calibrate(tiny_llama(), batches, target=MeanK(8), feed_forward_target=LossIncrease(0.1))


def test_a_search_without_a_loss_is_named(batches):
    with pytest.raises(
        ValueError, match="LossIncrease needs a loss and BertModel gave none; add labels to the batches"
    ):
        calibrate(tiny_bert(), batches, target=LossIncrease(0.1))


def first_output(output, arguments):
    return output[0].mean(1)[:, :1]  # [B, 1]


def test_outputs_named_by_an_objective_count_by_their_square(batches):
    ids = batches[0][:1]
    by_tensor = calibrate(tiny_bert(), [ids], target=MeanK(8), objective=first_output)
    by_number = calibrate(
        tiny_bert(), [ids], target=MeanK(8), objective=lambda *call: first_output(*call).sum() / LENGTH
    )
    for path, curves in by_tensor.curves.items():
        assert curves.loss_error.max() > 0
        torch.testing.assert_close(curves.loss_error, by_number.curves[path].loss_error)
    everything = calibrate(tiny_bert(), [ids], target=MeanK(8))
    assert all(curves.loss_change.abs().max() == 0 for curves in by_tensor.curves.values())
    assert all(curves.loss_change.abs().max() > 0 for curves in by_number.curves.values())
    path = next(iter(everything))
    assert not torch.allclose(everything.curves[path].loss_error, by_tensor.curves[path].loss_error, rtol=0.1)


def test_an_objective_sees_the_arguments_of_the_model(batches):
    seen = []

    def objective(output, arguments):
        seen.append(arguments)
        return output[0].square().mean()

    mask = torch.ones_like(batches[0])
    calibrate(
        tiny_bert(), [{"input_ids": batches[0], "attention_mask": mask}], target=LossIncrease(0.1), objective=objective
    )
    assert all(arguments["attention_mask"] is mask for arguments in seen)
    assert len(seen) == 1 + 6  # and a search for the bound


def test_a_search_for_outputs_is_named(batches):
    with pytest.raises(ValueError, match=r"LossIncrease needs a loss and objective gave a tensor of shape \[2, 1\]"):
        calibrate(tiny_bert(), batches, target=LossIncrease(0.1), objective=first_output)
