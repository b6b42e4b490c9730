"""The custom operators keep torch's rules: schema, fake tensors, autograd and tracing."""

import importlib

import pytest
import torch

from topk_attention.backends import full_attention

attention = importlib.import_module("topk_attention.backends.chunked.attention")
chunked_full_attention = importlib.import_module("topk_attention.backends.chunked.full_attention")
feed_forward = importlib.import_module("topk_attention.backends.chunked.feed_forward")

BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, HEAD_DIM, VALUE_DIM = 2, 4, 2, 5, 7, 3, 6


def attention_tensors(case, requires_grad):
    """query, key, value, attn_mask, bias, relative_bias, sinks, seed"""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)

    query, key = random(BATCH, HEADS, QUERIES, HEAD_DIM), random(BATCH, KEY_HEADS, KEYS, HEAD_DIM)
    value = random(BATCH, KEY_HEADS, KEYS, VALUE_DIM)
    if case == "transposed":
        query, key, value = (
            x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(requires_grad)
            for x in (query, key, value)
        )
    mask = bias = relative_bias = sinks = seed = None
    if case == "bool mask and bias":
        mask, bias = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.7, random(1, HEADS, 1, KEYS)
    if case == "float mask and relative bias":
        mask, relative_bias = torch.randn(1, 1, QUERIES, KEYS).double(), random(HEADS, QUERIES + KEYS - 1)
    if case == "dropout":
        seed = torch.tensor(17)
    if "sinks" in case:
        sinks = random(HEADS)
    if case == "everything":
        sinks = random(HEADS)
        mask, bias, seed = torch.rand(BATCH, 1, 1, KEYS) < 0.7, random(1, HEADS, 1, KEYS), torch.tensor(17)
        relative_bias = random(1, QUERIES + KEYS - 1)
    return query, key, value, mask, bias, relative_bias, sinks, seed


CASES = pytest.mark.parametrize(
    "case",
    [
        "plain",
        "transposed",
        "bool mask and bias",
        "float mask and relative bias",
        "dropout",
        "sinks and cap",
        "everything",
    ],
)
REQUIRES_GRAD = pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "with gradients"])


def topk_options(case):
    """head_k, is_causal, scale, softcap, dropout_p, query_chunk_size"""
    head_k = [1, 3, 3, 2] if case in ("float mask and relative bias", "everything") else [3] * HEADS
    dropout_p = 0.3 if case in ("dropout", "everything") else 0.0
    softcap = 1.5 if case == "sinks and cap" else 0.0
    return head_k, case in ("transposed", "everything"), 0.5, softcap, dropout_p, 2 if case == "plain" else None


@CASES
@REQUIRES_GRAD
def test_topk_attention_is_a_proper_operator(case, requires_grad):
    arguments = (*attention_tensors(case, requires_grad), *topk_options(case), True)
    torch.library.opcheck(attention.topk_attention_op, arguments)


@CASES
def test_topk_attention_without_a_saved_selection_is_a_proper_operator(case):
    arguments = (*attention_tensors(case, False), *topk_options(case), False)
    torch.library.opcheck(attention.topk_attention_op, arguments)


ALL = [True] * 4
ALONE = [[number == wanted for number in range(4)] for wanted in range(4)]


def backward_cases(cases):
    """Every case with all gradients, and each gradient alone where everything has a part."""
    pairs = [*((case, ALL) for case in cases), *(("everything", wanted) for wanted in ALONE)]
    return pytest.mark.parametrize(("case", "wanted"), pairs)


BACKWARD_CASES = backward_cases(CASES.args[1])


@BACKWARD_CASES
def test_topk_attention_backward_is_a_proper_operator(case, wanted):
    tensors = attention_tensors(case, False)
    query, key, value, _, bias, relative_bias, _, seed = tensors
    head_k, _, scale, softcap, dropout_p, _ = options = topk_options(case)
    output, indices, weights, _ = attention.topk_attention_op(*tensors, *options, True)
    shapes = [list(x.shape) if x is not None else [] for x in (bias, relative_bias)]
    saved = (query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p)
    arguments = (torch.randn_like(output), *saved, *wanted, *shapes)
    torch.library.opcheck(attention.topk_attention_backward_op, arguments)


@CASES
@REQUIRES_GRAD
def test_chunked_full_attention_is_a_proper_operator(case, requires_grad):
    _, *options = topk_options(case)
    torch.library.opcheck(chunked_full_attention.full_attention_op, (*attention_tensors(case, requires_grad), *options))


@BACKWARD_CASES
def test_chunked_full_attention_backward_is_a_proper_operator(case, wanted):
    tensors = attention_tensors(case, False)
    _, *options = topk_options(case)
    output, log_sums = chunked_full_attention.full_attention_op(*tensors, *options)
    shapes = [list(x.shape) if x is not None else [] for x in tensors[4:6]]
    arguments = (torch.randn_like(output), output, log_sums, *tensors, *options, *wanted, *shapes)
    torch.library.opcheck(chunked_full_attention.full_attention_backward_op, arguments)


def full_arguments(case, requires_grad):
    query, key, value, mask, *_ = attention_tensors(case, requires_grad)
    query = query.detach()[..., :2].contiguous().requires_grad_(requires_grad)
    key, value = (x.detach()[..., :2].contiguous().requires_grad_(requires_grad) for x in (key, value))
    if case == "nan":
        with torch.no_grad():
            value[1, 1, -1] = torch.nan
    return query, key, value, mask, None, None, None, None, case in ("everything", "nan"), 0.5, 0.0, 0.0, None


FULL_CASES = pytest.mark.parametrize(
    "case", ["plain", "bool mask and bias", "float mask and relative bias", "everything", "nan"]
)


def check_operator(operator, arguments, case):
    if case == "nan":  # the other checks take NaN to differ from NaN
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    else:
        torch.library.opcheck(operator, arguments)


@FULL_CASES
@REQUIRES_GRAD
def test_full_attention_is_a_proper_operator(case, requires_grad):
    arguments = full_arguments(case, requires_grad)
    assert bool(full_attention.full_attention_op(*arguments)[2]) == (case != "nan")
    check_operator(full_attention.full_attention_op, arguments, case)


@backward_cases(FULL_CASES.args[1])
def test_full_attention_backward_is_a_proper_operator(case, wanted):
    arguments = full_arguments(case, False)
    output, *saved = full_attention.full_attention_op(*arguments)
    arguments = (torch.randn_like(output), output, *saved, *arguments, *wanted, [], [])
    check_operator(full_attention.full_attention_backward_op, arguments, case)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("save_selection", [False, True], ids=["output alone", "with selection"])
@CASES
@REQUIRES_GRAD
def test_cpu_attention_is_a_proper_operator(case, requires_grad, save_selection):
    *options, _ = topk_options(case)
    arguments = (*attention_tensors(case, requires_grad and save_selection), *options, save_selection)
    torch.library.opcheck(torch.ops.topk_attention.cpu_attention_forward.default, arguments)


@pytest.mark.usefixtures("kernels")
@BACKWARD_CASES
def test_cpu_attention_backward_is_a_proper_operator(case, wanted):
    tensors = attention_tensors(case, False)
    query, key, value, _, bias, relative_bias, _, seed = tensors
    head_k, is_causal, scale, softcap, dropout_p, _ = topk_options(case)
    forward = torch.ops.topk_attention.cpu_attention_forward.default
    output, indices, weights, _ = forward(*tensors, head_k, is_causal, scale, softcap, dropout_p, True)
    shapes = [list(x.shape) if x is not None else [] for x in (bias, relative_bias)]
    saved = (query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p)
    arguments = (torch.randn_like(output), *saved, *wanted, *shapes)
    torch.library.opcheck(torch.ops.topk_attention.cpu_attention_backward.default, arguments)


@pytest.mark.usefixtures("kernels")
def test_the_cpu_backward_pass_without_a_saved_selection_is_refused():
    *options, _ = topk_options("plain")
    forward = torch.ops.topk_attention.cpu_attention_forward.default
    output, *_ = forward(*attention_tensors("plain", True), *options, False)
    with pytest.raises(RuntimeError, match="cpu_attention_forward needs save_selection=True for a backward pass"):
        output.sum().backward()


TOKENS, MODEL, NEURONS, OUTPUTS = 6, 3, 8, 5


def feed_forward_arguments(case, requires_grad):
    """All arguments but save_selection."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)

    x, w_in, w_out = random(TOKENS, MODEL), random(NEURONS, MODEL), random(OUTPUTS, NEURONS)
    w_gate = b_in = b_gate = b_out = seed = None
    if case == "transposed":
        x, w_in, w_out = (y.detach().mT.contiguous().mT.requires_grad_(requires_grad) for y in (x, w_in, w_out))
    if case in ("gated", "all neurons"):
        w_gate, b_in, b_gate, b_out = random(NEURONS, MODEL), random(NEURONS), random(NEURONS), random(OUTPUTS)
    if case == "dropout":
        seed = torch.tensor(17)
    k = NEURONS if case == "all neurons" else 3
    cut = (0.5, 1.0) if case == "gated" else (None, 0.0)
    return x, w_in, w_out, w_gate, b_in, b_gate, b_out, seed, k, "gelu", *cut, 0.3 if seed is not None else 0.0, 4


FEED_FORWARD_CASES = pytest.mark.parametrize("case", ["plain", "transposed", "gated", "all neurons", "dropout"])


@FEED_FORWARD_CASES
@REQUIRES_GRAD
def test_feed_forward_is_a_proper_operator(case, requires_grad):
    torch.library.opcheck(feed_forward.feed_forward_op, (*feed_forward_arguments(case, requires_grad), True))


@FEED_FORWARD_CASES
def test_feed_forward_backward_is_a_proper_operator(case):
    arguments = feed_forward_arguments(case, False)
    output, *selection = feed_forward.feed_forward_op(*arguments, True)
    tensors, seed, options = arguments[:6], arguments[7], arguments[9:]
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            feed_forward.feed_forward_backward_op,
            (torch.randn_like(output), *tensors, seed, *selection, *options, wanted),
        )


def test_a_backward_pass_without_a_saved_selection_is_refused():
    output, *_ = attention.topk_attention_op(*attention_tensors("plain", True), *topk_options("plain"), False)
    with pytest.raises(RuntimeError, match="chunked_topk_attention needs save_selection=True for a backward pass"):
        output.sum().backward()
    output, *_ = feed_forward.feed_forward_op(*feed_forward_arguments("plain", True), False)
    with pytest.raises(RuntimeError, match="chunked_feed_forward needs save_selection=True for a backward pass"):
        output.sum().backward()
