"""A named backend runs or raises; "auto" says what it chose and why."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import topk_attention
from comparison import (
    CALL_NAMES,
    SIZES,
    assert_same,
    assert_within_measured_allowance,
    attention_inputs,
    largest_errors,
    named_call,
)
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
    assert choose_backend(backend, attention_call(head_k=(11, 3, 3, 3))).name == backend
    assert choose_backend(backend, attention_call(return_selection=True)).name == backend
    assert choose_backend(backend, feed_forward_call()).name == backend


@pytest.mark.usefixtures("kernels")
def test_cpu_chunks_queries_and_tokens_where_nothing_is_selected():
    for call in (attention_call(), replace(feed_forward_call(), k=None)):
        choice = choose_backend("cpu", call)
        assert choice.name == "chunked"
        assert "k=None is chunking alone" in choice.reason
    inputs = attention_inputs()
    assert torch.equal(attend(*inputs, k=None, backend="cpu"), attend(*inputs, k=None, backend="chunked"))


def test_auto_chooses_a_backend_with_linear_memory_and_says_why():
    choice = choose_backend("auto")
    assert choice.name in BACKENDS
    assert choice.name != "reference"
    assert choice.reason


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r'backend must be one of "auto", "cpu", "triton", "chunked", "reference", got .fastest'
    ):
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
@pytest.mark.parametrize(
    "option",
    ["plain", "causal", "bool mask", "float mask", "grouped heads", "causal with more keys", "causal with padding"],
)
def test_auto_takes_the_attention_of_pytorch_where_every_head_keeps_all_keys(option, head_k):
    call = {
        "plain": lambda call: call,
        "causal": lambda call: replace(call, is_causal=True),
        "bool mask": lambda call: replace(call, attn_mask=torch.ones(1, 1, 11, 11, dtype=torch.bool)),
        "float mask": lambda call: replace(call, attn_mask=torch.zeros(1, 1, 11, 11)),
        "grouped heads": lambda call: replace(call, key=call.key[:, :2], value=call.value[:, :2]),
        "causal with more keys": lambda call: replace(call, is_causal=True, query=call.query[:, :, 3:]),
        "causal with padding": lambda call: replace(
            call, is_causal=True, attn_mask=torch.ones(2, 1, 1, 11, dtype=torch.bool)
        ),
    }[option](attention_call(head_k=head_k))
    choice = choose_backend("auto", call)
    assert choice.name == "sdpa"
    assert "full attention, over every visible key" in choice.reason


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
    "with strided rows": lambda call: replace(call, key=call.key.mT.contiguous().mT),
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


@pytest.fixture
def chunked_calls(monkeypatch):
    """A list that receives the arguments of each call of full attention that the chunked backend computes."""
    calls = []
    module = importlib.import_module("topk_attention.backends.chunked.full_attention")
    run = module.full_attention_op
    monkeypatch.setattr(module, "full_attention_op", lambda *x: calls.append(x) or run(*x))
    return calls


NOT_FINITE = pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])


@NOT_FINITE
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("num_queries", [1, 4, 11])
@pytest.mark.parametrize("hides", ["nothing", "the future", "a key", "a key, by -inf"])
def test_nan_and_inf_go_as_far_as_in_the_other_backends(chunked_calls, hides, num_queries, name, broken):
    inputs = attention_inputs(SIZES._replace(queries=num_queries, value_dim=3))
    mask = torch.arange(SIZES.keys) != 6
    options = {
        "nothing": {},
        "the future": {"is_causal": True},
        "a key": {"attn_mask": mask},
        "a key, by -inf": {"attn_mask": torch.zeros(SIZES.keys).double().masked_fill(~mask, -torch.inf)},
    }[hides]
    finite, expected_finite = (attend(*inputs, k=None, backend=b, **options) for b in ("auto", "chunked"))
    assert_same([finite], [expected_finite])
    chunked_calls.clear()
    tensor = dict(zip(("query", "key", "value"), inputs, strict=True))[name]
    tensor[:, :, 0 if name == "query" else 6, 1] = broken
    output = attend(*inputs, k=None, **options)
    hides_something = hides.startswith("a key") or (hides == "the future" and num_queries > 1)
    assert chunked_calls or (name == "value" and not hides_something) or (hides == "the future" and name == "value")
    expected = attend(*inputs, k=None, backend="reference", **options)
    if name == "value" and broken.__abs__() == torch.inf:  # infinite or NaN, as the sum may be
        assert torch.equal(output.isfinite(), expected.isfinite())
        output, expected = (x.masked_fill(~expected.isfinite(), 0) for x in (output, expected))
    assert_same([output], [expected])


COMPILED = pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["one key, NaN", "a query of NaN", "a key of -inf with a score of -inf"])
def test_nan_and_inf_of_a_single_head_that_leave_no_trace_in_pytorchs_output_are_found(case, dtype, is_compiled):
    num_keys = {"one key, NaN": 1, "a query of NaN": 7}.get(case, 40)
    query, key, value = (torch.ones(1, 1, n, 8, dtype=dtype) for n in (1, num_keys, num_keys))
    if case == "a query of NaN":
        query[...] = torch.nan
    elif case == "one key, NaN":
        key[...] = torch.nan
    else:
        key[0, 0, num_keys // 2, 0] = -torch.inf
    run = torch.compile(attend, backend="eager", fullgraph=True) if is_compiled else attend
    expected = attend(query, key, value, k=None, backend="reference")
    assert expected.isnan().all()
    assert run(query, key, value, k=None).isnan().all()


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


@pytest.fixture(params=["whole", "in parts"])
def masks(request, monkeypatch):
    """Masks that differ from query to query, written out at once and again for three queries at a time."""
    if request.param == "in parts":
        monkeypatch.setattr(sdpa, "_MASK_BYTES", 1)
        monkeypatch.setattr(sdpa, "_FEWEST_QUERIES", 3)


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("num_queries", [1, 7, 11, 13])
@pytest.mark.parametrize("name", CALL_NAMES)
def test_auto_equals_the_reference_where_all_keys_are_kept(name, num_queries):
    call = named_call(name, SIZES._replace(queries=num_queries, value_dim=3), smallest_gap=0)
    for k in (None, 50):
        assert_same(call.run(k=k), call.run(k=k, backend="reference"))
    for dropout_p in (0.0, 0.3):
        torch.manual_seed(3)
        expected = call.run(k=None, dropout_p=dropout_p, backend="reference")
        torch.manual_seed(3)
        assert_same(call.run(k=None, dropout_p=dropout_p), expected)


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_queries", [1, 7])
@pytest.mark.parametrize("name", ["plain", "causal", "padding_mask", "float_mask", "grouped_query_heads"])
def test_auto_is_as_close_to_float64_as_the_reference_where_all_keys_are_kept(name, num_queries, dtype):
    errors = []
    for seed in range(4):
        call = named_call(
            name, SIZES._replace(queries=num_queries, head_dim=16, value_dim=16), dtype, 0, first_seed=seed
        )
        truth = replace(
            call,
            tensors=[x.double() for x in call.tensors],
            options={
                option: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for option, value in call.options.items()
            },
        ).run(k=None, backend="reference")
        runs = [call.run(k=None, backend=backend) for backend in ("auto", "reference")]
        assert all(x.dtype == dtype for run in runs for x in run)
        errors.append([largest_errors(run, truth) for run in runs])
    assert_within_measured_allowance(*map(torch.stack, zip(*errors, strict=True)), dtype)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_keys_and_values_of_any_layout_give_the_same(num_queries):
    query, key, value = attention_inputs(SIZES._replace(queries=num_queries, value_dim=3))
    expected = attend(query, key, value, k=None, backend="reference")
    cache = torch.full((2, 4, 20, 3), torch.nan, dtype=torch.float64)
    cache[:, :, : SIZES.keys] = key
    by_position = value.transpose(1, 2).contiguous().transpose(1, 2)
    for keys in (key, cache[:, :, : SIZES.keys], key.mT.contiguous().mT):
        for values in (value, by_position, value.flip(-1).flip(-1)):
            assert_same([attend(query, keys, values, k=None)], [expected])


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
    assert done.stderr.count("UserWarning: topk_attention runs without its compiled kernels") == 1
    assert "pip install --force-reinstall --no-deps --no-build-isolation ." in done.stderr


WARNED_AT_IMPORT = """
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import topk_attention
assert len(caught) == 1 and "topk_attention runs without its compiled kernels" in str(caught[0].message), caught
ignore = str(caught[0].message).partition("If slower is meant, ")[2].partition(" before the import")[0]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    exec(ignore)
    topk_attention.backends._warn_of_missing_kernels()
assert not caught, caught
"""


def test_missing_kernels_are_warned_of_at_import_and_the_warning_says_how_it_is_ignored(tmp_path):
    done = run_copied_package(tmp_path, WARNED_AT_IMPORT)()
    assert done.returncode == 0, done.stderr


def test_kernels_that_do_not_load_are_a_reason_and_no_error(tmp_path):
    code = WITHOUT_KERNELS.replace(
        "the package was installed without its compiled kernels", "the compiled kernels do not load: "
    )
    run = run_copied_package(tmp_path, code)
    (tmp_path / "topk_attention" / "_kernels.abi3.so").write_bytes(b"not a library")
    done = run()
    assert done.returncode == 0, done.stderr


OTHER_KERNELS = """
import torch

library = torch.library.Library("topk_attention", "FRAGMENT")
if {interface} is not None:
    library.define("kernel_interface() -> int", tags=())
    library.impl("kernel_interface", lambda: {interface}, "CompositeExplicitAutograd")
torch.ops.load_library = lambda path: None
from topk_attention.backends import choose_backend, cpu

assert cpu.problem() == "the compiled kernels are of another version of the package: rebuild them", cpu.problem()
assert choose_backend("auto").name == "chunked"
"""


@pytest.mark.parametrize("interface", [None, 1])
def test_kernels_of_another_version_are_not_used(tmp_path, interface):
    run = run_copied_package(tmp_path, OTHER_KERNELS.format(interface=interface))
    (tmp_path / "topk_attention" / "_kernels.abi3.so").touch()
    done = run()
    assert done.returncode == 0, done.stderr
