"""A named backend is taken at its word; "auto" says what it chose and why."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparison import SIZES, assert_same, attention_inputs, output_and_gradients

import topk_attention
from topk_attention.backends import BACKENDS, choose_backend, sdpa
from topk_attention.backends.calls import AttentionCall, FeedForwardCall
from topk_attention.backends.cpu import library

attend = topk_attention.topk_attention


def attention_call(**options):
    query, key, value = attention_inputs(SIZES._replace(queries=11, value_dim=3), torch.float32)
    call = AttentionCall(query, key, value, None, None, None, None, False, 0.5, 0.0, None, None, False)
    return replace(call, **options)


def feed_forward_call():
    tensors = [torch.randn(shape) for shape in ((5, 3), (7, 3), (2, 7))]
    return FeedForwardCall(*tensors, None, None, None, None, 3, "relu", 0.0, None, None)


def on_meta(call):
    return replace(call, query=call.query.to("meta"), key=call.key.to("meta"), value=call.value.to("meta"))


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(library, "_PROBLEM", "no compiler was there")


def test_a_named_backend_is_chosen(backend):
    assert choose_backend(backend).name == backend
    assert choose_backend(backend, attention_call()).name == backend


def test_auto_chooses_a_backend_with_linear_memory_and_says_why():
    choice = choose_backend("auto")
    assert choice.name in BACKENDS
    assert choice.name != "reference"
    assert choice.reason


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r'backend must be one of "auto", "cpu", "chunked", "reference", got .fastest'):
        choose_backend("fastest")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_k", [(3, 3, 3, 3), (11, 11, 11, 10), (1, 11, 11, 11)])
def test_auto_takes_the_kernels_where_some_head_keeps_fewer_keys_than_there_are(head_k):
    choice = choose_backend("auto", attention_call(head_k=head_k))
    assert choice.name == "cpu"
    assert choice.reason.startswith("the fastest for CPU tensors")
    inputs = attention_inputs()
    assert torch.equal(attend(*inputs, k=head_k), attend(*inputs, k=head_k, backend="cpu"))


@pytest.mark.parametrize("head_k", [None, (11, 11, 11, 11)])
@pytest.mark.parametrize("option", ["plain", "causal", "bool mask", "float mask", "grouped heads"])
def test_auto_takes_the_attention_of_pytorch_where_every_head_keeps_all_keys(option, head_k):
    call = {
        "plain": lambda call: call,
        "causal": lambda call: replace(call, is_causal=True),
        "bool mask": lambda call: replace(call, attn_mask=torch.ones(1, 1, 11, 11, dtype=torch.bool)),
        "float mask": lambda call: replace(call, attn_mask=torch.zeros(1, 1, 11, 11)),
        "grouped heads": lambda call: replace(call, key=call.key[:, :2], value=call.value[:, :2]),
    }[option](attention_call(head_k=head_k))
    choice = choose_backend("auto", call)
    assert choice.name == "sdpa"
    assert "every visible key is kept" in choice.reason


OBSTACLES = {
    "k is smaller than the number of keys": lambda call: replace(call, head_k=(11, 11, 11, 10)),
    "it returns no selection": lambda call: replace(call, return_selection=True),
    "not tried on this device": on_meta,
    "with dropout": lambda call: replace(call, dropout_p=0.1, seed=torch.tensor(1)),
    "with a bias": lambda call: replace(call, bias=torch.zeros(1, 4, 11, 11)),
    "with a bias it": lambda call: replace(call, relative_bias=torch.zeros(4, 21)),
    "it needs a float mask in the dtype of the query": lambda call: replace(
        call, attn_mask=torch.zeros(1, 1, 1, 11, dtype=torch.float64)
    ),
    "with values of another size than keys": lambda call: replace(call, value=call.value[..., :2]),
    "it aligns causal queries with the first key": lambda call: replace(
        call, is_causal=True, query=call.query[:, :, 1:]
    ),
    "and takes no mask beside": lambda call: replace(
        call, is_causal=True, attn_mask=torch.ones(1, 1, 11, 11, dtype=torch.bool)
    ),
    "there is nothing to compute": lambda call: replace(call, query=call.query[:, :, :0]),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("words", OBSTACLES)
def test_what_stands_in_the_way_of_pytorchs_attention_sends_auto_elsewhere(words):
    call = OBSTACLES[words](attention_call())
    assert words in sdpa.obstacle(call)
    choice = choose_backend("auto", call)
    if call.return_selection or call.head_k is not None:
        assert choice.name == "cpu"
    else:
        assert choice.name == "chunked"
        assert words in choice.reason


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_nan_or_inf_in_an_input_sends_auto_elsewhere(name, broken):
    call = attention_call()
    getattr(call, name)[1, 2, 3, 0] = broken
    assert choose_backend("auto", call).name == "chunked"
    assert "NaN and inf in hidden keys would spread" in choose_backend("auto", call).reason


def test_values_whose_sum_overflows_are_no_reason_to_give_a_wrong_answer():
    query, key, value = attention_inputs(SIZES._replace(value_dim=3), torch.float32)
    value[...] = torch.finfo(torch.float32).max / 64
    assert value.sum().isinf()
    actual, expected = (attend(query, key, value, k=None, backend=name) for name in ("auto", "reference"))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("option", ["mask", "causal", "bias"])
def test_auto_never_lets_a_hidden_nan_spread(option):
    query, key, value = attention_inputs(SIZES._replace(queries=SIZES.keys, value_dim=3))
    options = {
        "mask": {"attn_mask": torch.arange(SIZES.keys) < SIZES.keys - 1},
        "causal": {"is_causal": True},
        "bias": {"bias": torch.zeros(SIZES.keys).double().masked_fill(torch.arange(SIZES.keys) == 10, -torch.inf)},
    }[option]
    expected = attend(query, key, value, k=None, **options)
    for tensor in (key, value):
        tensor[:, :, -1] = torch.nan
    output = attend(query, key, value, k=None, **options)
    hidden_from = slice(0, -1) if option == "causal" else slice(None)
    assert_same([output[:, :, hidden_from]], [expected[:, :, hidden_from]])


@pytest.mark.parametrize(
    "option", ["plain", "causal", "mask", "float mask", "grouped heads", "dropout", "bias", "decode"]
)
@pytest.mark.parametrize("k", [11, 50, None])
def test_auto_equals_the_reference_where_all_keys_are_kept(option, k):
    sizes = SIZES._replace(queries=11, value_dim=3, key_heads=2 if option == "grouped heads" else 4)
    inputs = attention_inputs(sizes._replace(queries=4) if option == "decode" else sizes)
    mask = torch.rand(11, 11) < 0.6
    mask[4] = False  # a query without keys
    options = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": mask},
        "float mask": {"attn_mask": torch.randn(11, 11).double().masked_fill(~mask, -torch.inf)},
        "grouped heads": {"enable_gqa": True},
        "dropout": {"dropout_p": 0.3},
        "bias": {"bias": torch.randn(11, 11).double()},
        "decode": {"is_causal": True},
    }.get(option, {})

    def run(backend):
        torch.manual_seed(3)
        return output_and_gradients(lambda *x: attend(*x, k=k, backend=backend, **options), *inputs)

    assert_same(run("auto"), run("reference"))


@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_auto_is_chunked_and_gives_the_reason():
    for call in (None, attention_call(head_k=(3, 3, 3, 3))):
        assert choose_backend("auto", call) == ("chunked", "no compiler was there")
    assert choose_backend("auto", attention_call()).name == "sdpa"
    inputs = attention_inputs()
    assert torch.equal(attend(*inputs, k=3), attend(*inputs, k=3, backend="chunked"))


@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_cpu_is_refused_with_the_way_out():
    words = 'backend="cpu" cannot run here: no compiler was there; use backend="auto"'
    with pytest.raises(RuntimeError, match=words):
        choose_backend("cpu")
    with pytest.raises(RuntimeError, match=words):
        attend(*attention_inputs(), k=3, backend="cpu")


def test_auto_is_chunked_on_other_devices():
    call = on_meta(attention_call(head_k=(3, 3, 3, 3)))
    assert choose_backend("auto", call) == ("chunked", "the compiled kernels are for CPU tensors")


@pytest.mark.usefixtures("kernels")
def test_cpu_refuses_tensors_of_other_devices():
    inputs = [x.to("meta") for x in attention_inputs()]
    with pytest.raises(ValueError, match='backend="cpu" needs CPU tensors, got meta; move them or use backend="auto"'):
        attend(*inputs, k=3, backend="cpu")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("k", "name"), [(3, "cpu"), (6, "cpu"), (7, "chunked"), (None, "chunked")])
def test_auto_takes_the_kernels_for_feed_forward_layers_that_keep_some_neurons(k, name):
    assert choose_backend("auto", replace(feed_forward_call(), k=k)).name == name


WITHOUT_KERNELS = """
import torch, topk_attention
from topk_attention.backends import choose_backend, cpu

assert cpu.problem().startswith("the package was installed without its compiled kernels"), cpu.problem()
assert choose_backend("auto").name == "chunked"
query, key, value = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
for k in (3, None):
    output = topk_attention.topk_attention(query, key, value, k=k)
    torch.testing.assert_close(output, topk_attention.topk_attention(query, key, value, k=k, backend="reference"))
    output.sum().backward()
print(topk_attention.__file__)
"""


def run_copied_package(folder, code):
    package = Path(topk_attention.__file__).parent
    shutil.copytree(package, folder / "topk_attention", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return lambda: subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_package_imports_and_works_without_its_kernels(tmp_path):
    done = run_copied_package(tmp_path, WITHOUT_KERNELS)()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_kernels_that_do_not_load_are_a_reason_and_no_error(tmp_path):
    code = WITHOUT_KERNELS.replace(
        "the package was installed without its compiled kernels", "the compiled kernels do not load: "
    )
    run = run_copied_package(tmp_path, code)
    (tmp_path / "topk_attention" / "_kernels.abi3.so").write_bytes(b"not a library")
    done = run()
    assert done.returncode == 0, done.stderr
