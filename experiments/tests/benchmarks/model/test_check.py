import pytest

from topk_experiments.benchmarks.model import measure as checking
from topk_experiments.benchmarks.model import methods
from topk_experiments.benchmarks.model.measure import check
from topk_experiments.benchmarks.model.methods import new_model
from topk_experiments.runs.checks import CheckFailedError


@pytest.mark.parametrize("feed_forward_k", [None, "all", 12])
@pytest.mark.parametrize("method", ["sdpa", "query-chunks", "topk"])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_every_method_computes_what_eager_attention_does(point, family, method, feed_forward_k):
    result = check(point(family, method, feed_forward_k=feed_forward_k))
    # Eager attention itself is up to 1.0e-4 from float64 (T5's large scores), the reference backend 1.3e-4.
    assert result["loss_error"] < 1e-5
    assert result["gradient_error"] < 3e-4
    if method == "topk":
        assert result["k"] < result["length"]
        assert result["loss_error_below_length"] < 1e-4


@pytest.mark.parametrize("method", ["performer", "rfa"])
def test_random_features_compute_what_the_same_features_do_written_out(point, method):
    result = check(point(method=method, length=200))
    assert result["length"] == 96
    assert "random features, every weight written out" in result["compared_with"]
    assert 0 < result["gradient_error"] < 3e-4
    assert result["loss_error"] < 1e-5


@pytest.mark.parametrize("method", ["performer", "rfa"])
def test_random_features_that_see_other_keys_are_an_error(point, monkeypatch, method):
    attend = methods._attend

    def wrong(module, query, key, *rest, **arguments):
        return attend(module, query, 1.1 * key.roll(1, 1), *rest, **arguments)

    monkeypatch.setattr(methods, "_attend", wrong)
    with pytest.raises(CheckFailedError, match=r"(loss|gradient)_error is"):
        check(point(method=method))


def test_a_kink_is_smoothed_for_the_check_and_said(point, monkeypatch):
    # A ReLU whose input is zero but for rounding makes two right answers differ by a whole gradient.
    models = []

    def watched(*options, **more):
        models.append(new_model(*options, **more))
        return models[-1]

    monkeypatch.setattr(checking, "new_model", watched)
    assert check(point("t5"))["activation"] == "GELU in place of ReLU"
    assert "activation" not in check(point("bert"))
    assert [getattr(model.config, "dense_act_fn", None) for model in models] == ["gelu", None]


def test_the_compiled_kernels_are_checked_and_not_pytorchs_attention(point, kernels, monkeypatch):
    used = []
    use_library = methods.use_library

    def watched(model, attention_k, feed_forward_k, *, backend):
        used.append((attention_k, backend))
        use_library(model, attention_k, feed_forward_k, backend=backend)

    monkeypatch.setattr(methods, "use_library", watched)
    check(point("t5", checkpointing=True, backend="auto"))
    assert used == [(40, "cpu"), (6, "cpu"), (6, "reference")]


@pytest.mark.parametrize(("wrong_at", "words"), [(40, "(loss|gradient)_error is"), (6, "loss_error_below_length is")])
def test_a_wrong_answer_is_an_error(point, monkeypatch, wrong_at, words):
    use_library = methods.use_library

    def wrong(model, attention_k, feed_forward_k, *, backend):
        k = 1 if attention_k == wrong_at and backend == "chunked" else attention_k
        use_library(model, k, feed_forward_k, backend=backend)

    monkeypatch.setattr(methods, "use_library", wrong)
    with pytest.raises(CheckFailedError, match=words):
        check(point("t5"))


def test_eager_attention_is_the_truth_itself_and_warms_up_like_the_others(point, monkeypatch):
    steps, step = [], checking._loss_and_gradients

    def watched(model, inputs):
        steps.append(inputs)
        return step(model, inputs)

    monkeypatch.setattr(checking, "_loss_and_gradients", watched)
    assert check(point(method="vanilla"))["compared_with"] is None
    assert len(steps) == 1
