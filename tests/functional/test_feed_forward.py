"""topk_feed_forward is a feed-forward layer over each token's k best neurons, however its tokens are chunked."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from comparison import (
    ACTIVATION_FORMULAS,
    OTHER_NAMES,
    assert_same,
    assert_within_measured_allowance,
    dense_feed_forward,
    largest_errors,
    output_and_gradients,
    small_integers,
)
from feed_forward_layers import MODEL, NEURONS, OUTPUTS, TOKENS, Layer, apply, random_layer, rank_gaps
from topk_attention import topk_feed_forward
from topk_attention.backends import choose_backend

chunked_feed_forward = importlib.import_module("topk_attention.backends.chunked.feed_forward")

KS = pytest.mark.parametrize("k", [1, 4, NEURONS - 1, NEURONS, NEURONS + 1, None])


KINDS = pytest.mark.parametrize("kind", ["plain", "plain with biases", "gated", "gated with biases"])


@KS
@KINDS
@pytest.mark.parametrize("activation", ACTIVATION_FORMULAS)
def test_output_and_gradients_are_those_of_the_layer_with_all_but_the_k_best_neurons_zeroed(
    backend, tiling, activation, kind, k
):
    layer = random_layer(kind)
    expected = layer.run_dense(k=k, activation=activation)
    assert_same(layer.run(k=k, activation=activation, backend=backend), expected)


@pytest.mark.parametrize("k", [NEURONS, 1000, None])
def test_with_all_neurons_it_is_the_ordinary_layer(backend, tiling, k):
    x, w_in, w_out, _, b_in, b_out, _ = random_layer("plain with biases")
    expected = F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, b_out)
    output = topk_feed_forward(x, w_in, w_out, k=k, b_in=b_in, b_out=b_out, activation="gelu", backend=backend)
    assert_same([output], [expected])


@pytest.mark.parametrize(("name", "formula"), OTHER_NAMES.items())
def test_names_from_transformers_mean_the_same_activations(backend, name, formula):
    layer = random_layer("gated")
    assert_same(layer.run(k=4, activation=name, backend=backend), layer.run_dense(k=4, activation=formula))


def test_the_default_activation_is_relu(backend):
    layer = random_layer("plain")
    assert_same([apply(layer, k=4, backend=backend)], [dense_feed_forward(*layer, k=4, activation="relu")])


@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_plain_layer_keeps_the_largest_pre_activations_even_if_negative(backend, tiling, k):
    layer = random_layer("plain")._replace(b_in=torch.full((NEURONS,), -20.0, dtype=torch.float64))
    expected = layer.run_dense(k=k, activation="identity")
    assert (expected[0] != 0).any()
    assert_same(layer.run(k=k, activation="identity", backend=backend), expected)


def test_a_gated_layer_keeps_the_largest_products_in_magnitude(backend, tiling):
    w_in = torch.tensor([[1.0], [-9.0], [5.0], [2.0]], dtype=torch.float64)
    w_gate = torch.tensor([[7.0], [-1.0], [0.0], [3.0]], dtype=torch.float64)  # products 7, 9, 0, 6
    x = torch.ones(1, 1, dtype=torch.float64)
    kept = topk_feed_forward(
        x, w_in, torch.eye(4, dtype=torch.float64), k=2, w_gate=w_gate, activation="identity", backend=backend
    )
    assert kept.tolist() == [[7.0, 9.0, 0.0, 0.0]]
    kept = topk_feed_forward(
        x, -w_in, torch.eye(4, dtype=torch.float64), k=2, w_gate=w_gate, activation="identity", backend=backend
    )
    assert kept.tolist() == [[-7.0, -9.0, 0.0, 0.0]]


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("neurons", [17, 60])
def test_of_tied_neurons_the_lower_index_is_kept(backend, tiling, neurons, kind, k):
    layer = Layer(
        small_integers(TOKENS, 4),
        small_integers(neurons, 4),
        torch.randn(OUTPUTS, neurons, dtype=torch.float64),
        small_integers(neurons, 4) if kind == "gated" else None,
    )
    expected = layer.run_dense(k=k, activation="identity")
    assert_same(layer.run(k=k, activation="identity", backend=backend), expected)


def test_with_all_neurons_tied_the_first_k_are_kept(backend, tiling):
    x, w_in = torch.ones(2, 3, dtype=torch.float64), torch.ones(NEURONS, 3, dtype=torch.float64)
    identity = torch.eye(NEURONS, dtype=torch.float64)
    output = topk_feed_forward(x, w_in, identity, k=4, activation="identity", backend=backend)
    assert torch.equal(output, (torch.arange(NEURONS) < 4).double().mul(3).expand(2, -1))


@pytest.mark.parametrize("k", [4, None])
@KINDS
@pytest.mark.parametrize("token_chunk_size", [1, 2, TOKENS - 1, TOKENS, TOKENS + 1, 10**6])
def test_token_chunk_size_changes_nothing(tiling, token_chunk_size, kind, k):
    layer = random_layer(kind)
    expected = layer.run(k=k, activation="silu", backend="chunked")
    actual = layer.run(k=k, activation="silu", backend="chunked", token_chunk_size=token_chunk_size)
    assert_same(actual, expected)


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("token_chunk_size", [None, 1, 5])
def test_pre_activations_exist_for_one_chunk_of_tokens_at_a_time(small_tiles, monkeypatch, token_chunk_size, k):
    sizes = []
    pre_activations = chunked_feed_forward._Layer.pre_activations

    def recorded(self, x):
        sizes.append(x.shape[0])
        return pre_activations(self, x)

    monkeypatch.setattr(chunked_feed_forward._Layer, "pre_activations", recorded)
    apply(random_layer("plain"), k=k, backend="chunked", token_chunk_size=token_chunk_size)
    assert sum(sizes) == TOKENS
    assert len(sizes) > 2
    assert token_chunk_size is None or max(sizes) <= token_chunk_size


@KINDS
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "gathered"])
def test_both_ways_to_the_gradient_of_the_hidden_layer_agree(tiling, monkeypatch, share, kind):
    layer = random_layer(kind)
    expected = layer.run(k=4, activation="gelu", backend="reference")
    calls = []
    dot_with_rows = chunked_feed_forward.dot_with_rows
    monkeypatch.setattr(chunked_feed_forward, "_GATHERED_PRODUCT_UP_TO", share)
    monkeypatch.setattr(chunked_feed_forward, "dot_with_rows", lambda *x: calls.append(x) or dot_with_rows(*x))
    assert_same(layer.run(k=4, activation="gelu", backend="chunked"), expected)
    assert bool(calls) == (share == 1.0)


@pytest.mark.parametrize(("k", "is_gathered"), [(1, True), (2, True), (3, False), (64, False)])
def test_a_small_share_of_neurons_is_gathered_and_a_large_one_is_not(monkeypatch, k, is_gathered):
    layer = random_layer("plain", neurons=64)
    expected = layer.run_dense(k=k)
    calls = []
    dot_with_rows = chunked_feed_forward.dot_with_rows
    monkeypatch.setattr(chunked_feed_forward, "dot_with_rows", lambda *x: calls.append(x) or dot_with_rows(*x))
    assert_same(layer.run(k=k, backend="chunked"), expected)
    assert bool(calls) == is_gathered


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("k", [3, None])
@KINDS
def test_gradients_match_finite_differences(backend, small_tiles, kind, k, dropout_p):
    layer = random_layer(kind, tokens=4, model=3, neurons=6, outputs=2)

    def function(*tensors):
        torch.manual_seed(3)  # each evaluation draws the same dropout
        return apply(
            layer.with_tensors(tensors),
            k=k,
            activation="silu",
            dropout_p=dropout_p,
            token_chunk_size=3,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in layer.present()])


@pytest.mark.parametrize("k", [4, None])
@KINDS
@pytest.mark.parametrize("token_chunk_size", [None, 1, 5])
def test_one_seed_drops_the_same_neurons_in_chunks_as_in_the_reference(tiling, token_chunk_size, kind, k):
    layer, options = random_layer(kind), {"k": k, "activation": "gelu", "dropout_p": 0.4}
    torch.manual_seed(9)
    expected = layer.run(backend="reference", **options)
    torch.manual_seed(9)
    assert_same(layer.run(backend="chunked", token_chunk_size=token_chunk_size, **options), expected)


@pytest.mark.parametrize("k", [8, None])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_a_neuron_is_dropped_or_divided_by_the_share_of_kept_ones(backend, dropout_p, k):
    tokens, neurons = 300, 40
    layer = random_layer("plain", tokens=tokens, neurons=neurons)._replace(w_out=torch.eye(neurons).double())
    before = apply(layer, k=k, activation="identity", backend=backend)
    options = {"k": k, "activation": "identity", "dropout_p": dropout_p, "backend": backend, "token_chunk_size": 7}
    after = apply(layer, **options)
    survived = after != 0
    assert_same([after], [torch.where(survived, before / (1 - dropout_p), 0)])
    num_kept = tokens * (k or neurons)
    deviation = abs(int(survived.sum()) - num_kept * (1 - dropout_p))
    assert deviation < 5 * math.sqrt(num_kept * dropout_p * (1 - dropout_p))
    assert not torch.equal(apply(layer, **options), after)


def test_dropout_leaves_the_output_bias_alone(backend):
    layer = random_layer("plain with biases")
    output = apply(layer, k=4, dropout_p=1 - 2**-32, backend=backend)
    assert_same([output], [layer.b_out.expand_as(output)])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("k", [4, None])
def test_x_may_have_any_leading_axes(backend, tiling, shape, k):
    layer = random_layer("gated with biases")._replace(x=torch.randn(*shape, MODEL, dtype=torch.float64))
    expected = layer.run_dense(k=k, activation="silu")
    actual = layer.run(k=k, activation="silu", backend=backend)
    assert actual[0].shape == (*shape, OUTPUTS)
    assert_same(actual, expected)


@pytest.mark.parametrize("k", [4, None])
def test_strides_do_not_matter(backend, tiling, k):
    layer = random_layer("gated with biases")
    strided = layer.with_tensors(
        torch.stack([x, torch.full_like(x, math.nan)], dim=-1).unbind(-1)[0] if x.ndim == 1 else x.mT.contiguous().mT
        for x in layer.present()
    )
    assert not any(x.is_contiguous() for x in strided.present())
    options = {"k": k, "activation": "silu", "backend": backend}
    assert_same(strided.run(**options), layer.run(**options))


@pytest.mark.parametrize("k", [4, None])
def test_one_matrix_may_be_both_input_and_output_weights(backend, tiling, k):
    x, w_in, *_ = random_layer("plain")

    def tied(x, w):
        return topk_feed_forward(x, w, w.t(), k=k, activation="gelu", backend=backend)

    def dense(x, w):
        return dense_feed_forward(x, w, w.t(), k=k, activation="gelu")

    assert_same(output_and_gradients(tied, x, w_in), output_and_gradients(dense, x, w_in))


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("wanted", range(7))
def test_each_argument_alone_may_require_a_gradient(backend, tiling, wanted, k):
    layer = random_layer("gated with biases")
    expected = layer.run(k=k, activation="silu", backend=backend)
    tensors = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(layer)]
    output = apply(Layer(*tensors), k=k, activation="silu", backend=backend)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad_output)
    assert_same([tensors[wanted].grad], [expected[1 + wanted]])
    assert all(x.grad is None for i, x in enumerate(tensors) if i != wanted)


@pytest.mark.parametrize("k", [4, None])
def test_a_second_backward_pass_over_one_graph_gives_equal_gradients(backend, tiling, k):
    tensors = [x.requires_grad_() for x in random_layer("gated with biases")]
    output = apply(Layer(*tensors), k=k, activation="silu", dropout_p=0.3, backend=backend)
    grad_output = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    second = torch.autograd.grad(output, tensors, grad_output)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_activation_checkpointing_changes_no_gradient(backend, tiling, dropout_p, k):
    layer = random_layer("gated with biases")

    def run(*tensors):
        return apply(Layer(*tensors), k=k, activation="silu", dropout_p=dropout_p, backend=backend)

    torch.manual_seed(1)
    expected = output_and_gradients(run, *layer)
    torch.manual_seed(1)
    assert_same(output_and_gradients(lambda *x: checkpoint(run, *x, use_reentrant=False), *layer), expected)


@pytest.mark.parametrize("k", [4, None])
def test_a_gradient_of_the_gradient_is_refused_in_words(fast_backend, k):
    layer = random_layer("gated")
    x = layer.x.requires_grad_()
    output = apply(layer, k=k, activation="silu", backend=fast_backend)
    (grad_x,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    words = 'the backward pass of topk_feed_forward cannot be differentiated again; backend="reference" can be'
    with pytest.raises(RuntimeError, match=words):
        grad_x.sum().backward()


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(backend, tiling, context, k):
    layer = random_layer("gated with biases")
    expected = apply(layer.with_tensors(x.requires_grad_() for x in layer.present()), k=k, backend=backend)
    with context():
        assert torch.equal(apply(layer, k=k, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [6, None])
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "gathered"])
@KINDS
def test_low_precision_is_as_close_to_float64_as_the_reference(monkeypatch, kind, dtype, k, share):
    monkeypatch.setattr(chunked_feed_forward, "_GATHERED_PRODUCT_UP_TO", share)
    errors, seed = [], 0
    while len(errors) < 4:
        seed += 1
        torch.manual_seed(seed)
        layer = random_layer(kind, tokens=40, model=24, neurons=64, outputs=16, dtype=dtype)
        if k is not None and rank_gaps(layer, k, "gelu").min() < 1e-5:
            continue
        options = {"k": k, "activation": "gelu", "token_chunk_size": 16}
        truth = layer.with_tensors(x.double() for x in layer.present()).run(backend="reference", **options)
        runs = [layer.run(backend=backend, **options) for backend in ("chunked", "reference")]
        assert all(x.dtype == dtype for run in runs for x in run)
        errors.append([largest_errors(run, truth) for run in runs])
    assert_within_measured_allowance(*map(torch.stack, zip(*errors, strict=True)), dtype)


@pytest.mark.parametrize("k", [6, None])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_linear_and_sums_in_float32(backend, tiling, autocast_dtype, k):
    layer = random_layer("gated with biases", dtype=torch.float32)
    tensors = [x.requires_grad_() for x in layer]
    options = {"k": k, "activation": "silu", "backend": backend}
    with torch.autocast("cpu", autocast_dtype):
        output = apply(Layer(*tensors), **options)
        assert output.dtype == F.linear(layer.x, layer.w_in).dtype == autocast_dtype
    gradients = torch.autograd.grad(output.float().square().sum(), tensors)
    assert all(grad.dtype == torch.float32 for grad in gradients)
    expected = apply(Layer(*(x.to(autocast_dtype) for x in tensors)), **options)
    assert torch.equal(output, expected)
    assert_same(gradients, torch.autograd.grad(expected.float().square().sum(), tensors))


@pytest.mark.parametrize("k", [6, None])
def test_a_backward_pass_under_autocast_sums_in_float32_too(tiling, k):
    layer = random_layer("gated with biases", dtype=torch.float32)
    tensors = [x.requires_grad_() for x in layer]
    output = apply(Layer(*tensors), k=k, activation="silu", backend="chunked")
    expected = torch.autograd.grad(output.square().sum(), tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(output.square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [3000, None])
def test_sums_over_many_neurons_are_kept_in_float32(backend, dtype, k):
    neurons = 4096
    x, w_in = torch.ones(2, 1, dtype=dtype), torch.ones(neurons, 1, dtype=dtype)
    w_out = torch.full((1, neurons), 1 / 4096, dtype=dtype)
    output = topk_feed_forward(x, w_in, w_out, k=k, backend=backend)
    assert torch.equal(output, torch.full_like(output, (k or neurons) / 4096))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("k", [2, None])
def test_the_output_bias_is_added_before_the_output_is_rounded(backend, k, tokens, dtype):
    half_a_step = torch.finfo(dtype).eps / 2
    x, w_in = torch.ones(tokens, 1, dtype=dtype), torch.ones(3, 1, dtype=dtype)
    w_out = torch.tensor([[1, half_a_step, 0]], dtype=dtype)  # their sum alone rounds to the even 1
    b_out = torch.tensor([half_a_step / 2], dtype=dtype, requires_grad=True)
    output = topk_feed_forward(x, w_in, w_out, k=k, b_out=b_out, backend=backend)
    assert torch.equal(output, torch.full_like(output, 1 + 2 * half_a_step))
    output.sum().backward()
    assert b_out.grad.tolist() == [tokens]


@pytest.mark.parametrize("k", [4, None])
def test_the_number_of_threads_changes_nothing(k):
    layer = random_layer("gated with biases", tokens=200, model=32, neurons=128, outputs=32)
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(layer.run(k=k, activation="silu", backend="chunked", token_chunk_size=64))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_the_arguments_are_left_as_they_were(backend, tiling):
    layer = random_layer("gated with biases")
    before = [x.clone() for x in layer]
    layer.run(k=4, activation="identity", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(layer, before, strict=True))


def test_auto_is_one_of_the_backends_with_linear_memory():
    layer = random_layer("plain")
    chosen = choose_backend("auto").name
    assert chosen != "reference"
    assert torch.equal(apply(layer, k=4), apply(layer, k=4, backend=chosen))


@st.composite
def integer_layers(draw):
    tokens, model = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    neurons, outputs = draw(st.one_of(st.integers(1, 12), st.integers(24, 60))), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shapes = [
        (tokens, model),
        (neurons, model),
        (outputs, neurons),
        (neurons, model),
        (neurons,),
        (outputs,),
        (neurons,),
    ]
    tensors = [small_integers(*shape, largest=2) for shape in shapes]
    tensors = [x.mT.contiguous().mT if x.ndim == 2 and draw(st.booleans()) else x for x in tensors]
    is_gated = draw(st.booleans())
    present = [True, True, True, is_gated, draw(st.booleans()), draw(st.booleans()), is_gated and draw(st.booleans())]
    options = {
        "k": draw(st.one_of(st.none(), st.integers(1, 3), st.integers(1, neurons + 2))),
        "activation": draw(st.sampled_from(["relu", "identity"])),  # exact on integers
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.5])),
    }
    chunks = draw(st.one_of(st.none(), st.integers(1, tokens + 1)))
    share = draw(st.sampled_from([0.0, 1 / 32, 1.0]))
    return (
        Layer(*(x if is_present else None for x, is_present in zip(tensors, present, strict=True))),
        options,
        chunks,
        share,
    )


@given(integer_layers())
def test_any_call_gives_the_output_and_the_gradients_of_the_reference(case):
    layer, options, token_chunk_size, share = case
    torch.manual_seed(0)
    expected = layer.run(backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_feed_forward, "_GATHERED_PRODUCT_UP_TO", share)
        torch.manual_seed(0)
        actual = layer.run(backend="chunked", token_chunk_size=token_chunk_size, **options)
    assert_same(actual, expected)


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("kind", ["plain with biases", "gated with biases"])
@pytest.mark.parametrize("frozen", [("w_in",), ("w_out",), ("w_gate",), ("w_in", "w_out", "w_gate"), ("x", "b_out")])
def test_freezing_some_tensors_changes_no_other_gradient(fast_backend, kind, frozen, k):
    layer = random_layer(kind)
    expected = dict(zip(named_tensors(layer), layer.run(k=k, backend=fast_backend)[1:], strict=True))
    tensors = {name: x.clone().requires_grad_(name not in frozen) for name, x in named_tensors(layer).items()}
    output = apply(layer._replace(**tensors), k=k, backend=fast_backend)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad_output)
    for name, x in tensors.items():
        if name in frozen:
            assert x.grad is None
        else:
            assert torch.equal(x.grad, expected[name])


def named_tensors(layer):
    return {name: x for name, x in zip(layer._fields, layer, strict=True) if x is not None}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["plain with biases", "gated with biases"])
@pytest.mark.parametrize("k", [4, None])
def test_a_token_that_is_not_finite_spoils_its_own_output_alone(backend, tiling, k, kind, broken):
    layer, options = random_layer(kind), {"k": k, "activation": "silu", "backend": backend}
    before = apply(layer, **options)
    layer.x[2, 1] = broken
    after = apply(layer, **options)
    others = torch.arange(TOKENS) != 2
    assert_same([after[others]], [before[others]])
    assert not after[2].isfinite().any()


@pytest.mark.parametrize("where", ["token", "gradient of its output"])
@pytest.mark.parametrize("kind", ["plain with biases", "gated with biases"])
@pytest.mark.parametrize("k", [4, None])
def test_nan_reaches_the_gradients_of_its_own_token_and_of_the_neurons_that_this_token_keeps(
    fast_backend, tiling, k, kind, where
):
    layer, options = random_layer(kind), {"k": k, "activation": "silu", "backend": fast_backend}
    grad_output = torch.randn(TOKENS, OUTPUTS, dtype=torch.float64)

    def gradients(grad_output):
        tensors = [x.detach().requires_grad_() for x in layer.present()]
        output = apply(layer.with_tensors(tensors), **options)
        return dict(zip(names, torch.autograd.grad(output, tensors, grad_output), strict=True))

    names = named_tensors(layer)
    # Without the token: once it is NaN it may keep other neurons than before.
    before = gradients(grad_output.index_fill(0, torch.tensor([2]), 0))
    (layer.x if where == "token" else grad_output)[2] = math.nan
    after = gradients(grad_output)
    others = torch.arange(TOKENS) != 2
    assert_same([after["x"][others]], [before["x"][others]])
    assert after["x"][2].isnan().all()
    spoilt = after["b_in"].isnan()
    assert spoilt.sum() == (k or NEURONS)
    for name in names.keys() - {"x", "b_out"}:
        of_neurons, of_neurons_before = (x[name].t() if name == "w_out" else x[name] for x in (after, before))
        assert of_neurons[spoilt].isnan().all()
        assert_same([of_neurons[~spoilt]], [of_neurons_before[~spoilt]])
    assert after["b_out"].isnan().all() == (where != "token")


@pytest.mark.parametrize("k", [4, NEURONS - 1])
def test_output_weights_of_a_neuron_nobody_keeps_are_never_read(fast_backend, tiling, k):
    layer = random_layer("plain with biases")
    layer.b_in[5] = -1e6
    before = apply(layer, k=k, backend=fast_backend)
    layer.w_out[:, 5] = math.nan
    assert_same([apply(layer, k=k, backend=fast_backend)], [before])
