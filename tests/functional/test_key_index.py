"""An index of keys follows what is done to them, and is refused with any other keys."""

from __future__ import annotations

import copy

import pytest
import torch

from hashed_index import use_hashes
from topk_attention import Completion, KeyIndex, topk_attention
from topk_attention.backends import cpu


@pytest.fixture(params=cpu.cpu_targets())
def target(request):
    """The kernels themselves, of one instruction set after the other."""
    with cpu.forced_cpu_target(request.param):
        yield


@pytest.fixture
def hashed(monkeypatch):
    if cpu.problem() is not None:
        pytest.skip(f"no compiled kernels: {cpu.problem()}")
    return use_hashes(monkeypatch)


def inputs(num_keys=100, heads=4, key_heads=2, rows=1, batch=(3,), dtype=torch.float32, head_dim=16):
    generator = torch.Generator().manual_seed(num_keys)
    query, key, value = (
        torch.randn(*batch, n, length, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for n, length in ((heads, rows), (key_heads, num_keys), (key_heads, num_keys))
    )
    return query, key, value


def attend(query, key, value, index, **options):
    return topk_attention(query, key, value, **{"k": 5, "enable_gqa": True, "key_index": index} | options)


def check(hashed, query, key, value, index, **options):
    """The call reads the index, which is of its keys, and gives what it gives without."""
    before = hashed.used
    output = attend(query, key, value, index, **options)
    assert hashed.used == before + 1
    assert torch.equal(output, attend(query, key, value, None, **options))


@pytest.mark.parametrize("batch", [(3,), (), (2, 3)])
def test_calls_read_the_index_of_their_keys(batch, hashed):
    query, key, value = inputs(batch=batch)
    check(hashed, query, key, value, KeyIndex(key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_of_these_dtypes_are_indexed(dtype, hashed):
    query, key, value = inputs(dtype=dtype)
    check(hashed, query, key, value, KeyIndex(key))


def test_an_index_says_how_many_keys_it_has_and_what_it_takes(hashed):
    _, key, _ = inputs(num_keys=100)
    index = KeyIndex(key)
    assert index.length == 100
    assert index.nbytes == sum(part.nbytes for part in index.panels())
    assert repr(index) == f"KeyIndex([3, 2, 100, 16], torch.float32, {index.nbytes:,} bytes)"


def test_only_new_keys_are_read_until_their_number_has_doubled(hashed):
    query, key, value = inputs(num_keys=300)
    index = KeyIndex(key[:, :, :40])
    for length in (*range(41, 80), 80, 81, 200, 201, 300):
        index.append(key[:, :, :length])
        check(hashed, query, key[:, :, :length], value[:, :, :length], index)
        if length < 80:
            assert hashed.read[-1] == (length - 1, length)
    assert [read for read in hashed.read if read[0] == 0] == [(0, 40), (0, 80), (0, 200)]


def test_appending_nothing_takes_the_new_tensor(hashed):
    query, key, value = inputs()
    index, twin = KeyIndex(key), key.clone()
    index.append(twin)
    assert len(hashed.read) == 1
    check(hashed, query, twin, value, index)
    with pytest.raises(ValueError, match="of another tensor"):
        attend(query, key, value, index)


def test_crop_keeps_the_first_keys(hashed):
    query, key, value = inputs()
    index = KeyIndex(key)
    for length in (64, 33, 32, 31, 1):
        index.crop(length)
        assert index.length == length
        index.append(key[:, :, :length])
        if length > 5:
            check(hashed, query, key[:, :, :length], value[:, :, :length], index)
    assert len(hashed.read) == 1
    index.append(key)
    assert hashed.read[-1] == (1, 100)
    index.crop(0)
    index.append(key)
    assert hashed.read[-1] == (0, 100)
    check(hashed, query, key, value, index)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 1, 2, 2]])
def test_reorder_follows_beams(order, hashed):
    query, key, value = inputs()
    index, order = KeyIndex(key), torch.tensor(order)
    index.reorder(order)
    query, key, value = query[order], key[order], value[order]
    index.append(key)
    check(hashed, query, key, value, index)
    assert len(hashed.read) == 1


def test_repeat_interleave_follows_keys(hashed):
    query, key, value = (x.repeat_interleave(2, dim=0) for x in inputs(batch=(3, 2)))
    index = KeyIndex(key[::2])
    index.repeat_interleave(2)
    index.append(key)
    check(hashed, query, key, value, index)


@pytest.mark.parametrize("copied", [KeyIndex.copy, copy.copy, copy.deepcopy])
def test_a_copy_grows_by_itself(copied, hashed):
    query, key, value = inputs()
    other = key.clone()
    other[:, :, 70:] += 1
    index = KeyIndex(key[:, :, :70])
    twin = copied(index)
    check(hashed, query, key[:, :, :70], value[:, :, :70], twin)
    index.append(key)
    twin.append(other)
    check(hashed, query, key, value, index)
    check(hashed, query, other, value, twin)


class TestStaleUseIsAnError:
    def test_keys_that_changed_in_place(self, hashed):
        query, key, value = inputs()
        index = KeyIndex(key)
        key[0, 0, 0, 0] = 7
        with pytest.raises(ValueError, match=r"key_index is out of date: key has changed in place .*append\(key\)"):
            attend(query, key, value, index)

    def test_other_keys(self, hashed):
        query, key, value = inputs()
        index = KeyIndex(key)
        for other in (key.clone(), key[:, :, :-1], key[:, :, 1:], key.double().float()):
            with pytest.raises(ValueError, match=r"key_index is of another tensor: \[3, 2, 100, 16\] torch.float32"):
                attend(query, other, value[:, :, : other.shape[2]], index)

    def test_other_keys_in_the_memory_of_those_that_are_gone(self, hashed):
        query, key, value = inputs()
        index = KeyIndex(key)
        del key
        for _ in range(20):  # the allocator would hand out the same memory again, if it were free
            with pytest.raises(ValueError, match="of another tensor"):
                attend(query, torch.randn(3, 2, 100, 16), value, index)

    @pytest.mark.parametrize(
        "change", [lambda x: x.crop(50), lambda x: x.reorder(torch.tensor([0])), lambda x: x.repeat_interleave(2)]
    )
    def test_an_index_that_was_changed_and_not_told_of_the_keys(self, change, hashed):
        query, key, value = inputs()
        index = KeyIndex(key)
        change(index)
        with pytest.raises(ValueError, match=r"key_index was cropped or reordered .* call key_index.append\(key\)"):
            attend(query, key, value, index)

    def test_the_same_rows_of_the_same_memory_are_the_same_keys(self, hashed):
        query, key, value = inputs()
        index = KeyIndex(key[:, :, :60])
        check(hashed, query, key[:, :, :60], value[:, :, :60], index)

    def test_it_is_noticed_also_where_the_index_is_not_used(self, hashed):
        query, key, value = inputs()
        index = KeyIndex(key.clone())
        for options in ({"k": "all"}, {"backend": "reference"}, {"completion": Completion()}):
            with pytest.raises(ValueError, match="key_index is of another tensor"):
                attend(query, key, value, index, **options)


NOT_USED = {
    "every key": {"k": 100},
    "all": {"k": "all"},
    "reference": {"backend": "reference"},
    "chunked": {"backend": "chunked"},
    "chunked, completed": {"backend": "chunked", "completion": Completion()},
    "every key, completed": {"k": 100, "completion": Completion()},
}


@pytest.mark.parametrize("case", NOT_USED)
def test_calls_that_cannot_use_it_do_without(case, hashed):
    query, key, value = inputs()
    output = attend(query, key, value, KeyIndex(key), **NOT_USED[case])
    assert hashed.used == 0
    assert torch.equal(output, attend(query, key, value, None, **NOT_USED[case]))


@pytest.mark.parametrize(("rows", "is_used"), [(1, True), (8, True), (9, False), (40, False)])
def test_up_to_16_queries_to_a_key_head_use_it(rows, is_used, hashed):
    query, key, value = inputs(rows=rows)
    output = attend(query, key, value, KeyIndex(key), is_causal=True)
    assert hashed.used == is_used
    assert torch.equal(output, attend(query, key, value, None, is_causal=True))


@pytest.mark.parametrize("completion", [None, Completion()], ids=["alone", "completed"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_calls_with_a_gradient_do_without(which, completion, hashed):
    tensors = [x.requires_grad_(i == which) for i, x in enumerate(inputs())]
    index = KeyIndex(tensors[1])
    attend(*tensors, index, completion=completion).sum().backward()
    gradient, tensors[which].grad = tensors[which].grad, None
    attend(*tensors, None, completion=completion).sum().backward()
    assert torch.equal(gradient, tensors[which].grad)
    assert hashed.used == 0
    with torch.no_grad():
        check(hashed, *tensors, index, completion=completion)


def test_a_mass_scale_that_wants_a_gradient_does_without(hashed):
    query, key, value = inputs()
    index, scale = KeyIndex(key), torch.ones(4, requires_grad=True)
    attend(query, key, value, index, completion=Completion(scale)).sum().backward()
    assert hashed.used == 0
    assert scale.grad.abs().min() > 0


def test_completed_calls_use_it_with_and_without_sums(hashed):
    query, key, value = inputs(rows=2)
    index, completion = KeyIndex(key), Completion([0.5, 1.0, 2.0, 0.0])
    check(hashed, query, key, value, index, completion=completion, is_causal=True)
    check(hashed, query, key, value, index, completion=completion, key_sums=completion.sums(key, value))
    check(hashed, query, key, value, index, completion=completion, bias=torch.randn(4, 2, 100), k=[3, 9, 100, 1])


def test_autocast_rounds_keys_and_does_without(hashed):
    query, key, value = inputs()
    index = KeyIndex(key)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key, value, index)
        assert torch.equal(output, attend(query, key, value, None))
    assert hashed.used == 0


def test_compiled_code_does_without(hashed):
    query, key, value = inputs()
    index = KeyIndex(key)
    compiled = torch.compile(lambda *x: attend(*x, index), backend="eager", fullgraph=True)
    assert torch.equal(compiled(query, key, value), attend(query, key, value, None))
    assert hashed.used == 0


def test_torch_func_does_without(hashed):
    query, key, value = inputs()
    index = KeyIndex(key)
    output = torch.vmap(lambda q: attend(q, key, value, index, k="all"))(query[None])
    assert torch.equal(output[0], attend(query, key, value, None, k="all"))


def test_options_of_the_call_reach_the_operator(hashed):
    query, key, value = inputs(rows=2)
    index, mask = KeyIndex(key), torch.rand(3, 1, 1, 100) > 0.3
    bias = torch.randn(4, 2, 100)
    check(hashed, query, key, value, index, attn_mask=mask, bias=bias, is_causal=True, scale=0.3, k=[3, 9, 100, 1])
    for completion in (None, Completion()):
        for given, expected in zip(
            attend(query, key, value, index, completion=completion, return_selection=True)[1],
            attend(query, key, value, None, completion=completion, return_selection=True)[1],
            strict=True,
        ):
            assert torch.equal(given, expected)
    assert hashed.used == 3


def test_float64_keys_have_an_index_that_takes_nothing(hashed):
    query, key, value = inputs(dtype=torch.float64)
    index = KeyIndex(key)
    assert (index.length, index.nbytes) == (100, 0)
    assert torch.equal(attend(query, key, value, index), attend(query, key, value, None))
    assert hashed.used == len(hashed.read) == 0
    index.crop(50)
    index.reorder(torch.tensor([1]))
    index.append(key[1:2, :, :60])
    attend(query[1:2], key[1:2, :, :60], value[1:2, :, :60], index.copy())
    with pytest.raises(ValueError, match=r"key must hold the 60 indexed keys first, got 50"):
        index.append(key[:1, :, :50])


def test_without_kernels_an_index_takes_nothing_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(cpu.library, "_PROBLEM", "no kernels today")
    query, key, value = inputs()
    index = KeyIndex(key)
    assert (index.length, index.nbytes) == (100, 0)
    output = attend(query, key, value, index, backend="chunked")
    assert torch.equal(output, attend(query, key, value, None, backend="chunked"))
    with pytest.raises(ValueError, match="of another tensor"):
        attend(query, key.clone(), value, index, backend="chunked")


@pytest.mark.parametrize("num_keys", [0, 1, 31, 32, 33])
def test_indexes_begin_small(num_keys, hashed):
    query, key, value = inputs(num_keys=40)
    index = KeyIndex(key[:, :, :num_keys])
    attend(query, key[:, :, :num_keys], value[:, :, :num_keys], index)
    for length in (num_keys + 1, 40):
        index.append(key[:, :, :length])
        attend(query, key[:, :, :length], value[:, :, :length], index)
    check(hashed, query, key, value, index)


@pytest.mark.parametrize("first", [False, True])
def test_inference_mode_can_begin_or_go_on_with_an_index(first, hashed):
    query, key, value = inputs()
    with torch.inference_mode(first):
        index = KeyIndex(key[:, :, :70])
    with torch.inference_mode(not first):
        index.append(key)
        index.reorder(torch.tensor([0, 2]))
        index.append(key[[0, 2]])
        index.append(held := key[[0, 2]])
        check(hashed, query[[0, 2]], held, value[[0, 2]], index)


def test_what_does_not_fit_is_refused_with_the_way_out(hashed):
    query, key, value = inputs()
    index = KeyIndex(key)
    with pytest.raises(TypeError, match="key_index must be a KeyIndex or None, got Tensor"):
        attend(query, key, value, key)
    with pytest.raises(TypeError, match="key must be a tensor, got list"):
        KeyIndex([1.0])
    with pytest.raises(ValueError, match=r"key must have shape \[..., heads, length, size\], got \[100, 16\]"):
        KeyIndex(key[0, 0])
    with pytest.raises(ValueError, match=r"key must be float16, bfloat16, float32 or float64, got torch\.int64"):
        KeyIndex(key.long())
    with pytest.raises(ValueError, match=r"key must have shape \[3, 2, M, 16\] to follow .*, got \[2, 2, 100, 16\]"):
        index.append(key[:2])
    with pytest.raises(ValueError, match=r"key must be torch.float32 on cpu to follow .*, got torch.float64 on cpu"):
        index.append(key.double())
    with pytest.raises(ValueError, match=r"key must hold the 100 indexed keys first, got 99 keys; crop\(99\)"):
        index.append(key[:, :, :99])
    for length in (101, -1, 1.0):
        with pytest.raises(ValueError, match=r"length must be an int from 0 to the 100 indexed keys, got"):
            index.crop(length)
    with pytest.raises(ValueError, match=r"repeats must be at least 1"):
        index.repeat_interleave(0)
    for method, argument in (("reorder", torch.tensor([0])), ("repeat_interleave", 2)):
        with pytest.raises(ValueError, match=rf"{method} is for keys with a batch axis"):
            getattr(KeyIndex(key[0]), method)(argument)
    check(hashed, query, key, value, index)


def pieces(num_keys):
    """Odd lengths up to this one."""
    return [length for length in (1, 7, 40, 41, 64, 97, 200, 201, 333) if length < num_keys] + [num_keys]


def test_an_index_takes_a_byte_for_each_number_and_one_more_for_each_key(target):
    _, key, _ = inputs(num_keys=3200, head_dim=64)
    num_keys = 3 * 2 * 3200
    assert 64 * num_keys < KeyIndex(key).nbytes <= 1.25 * 65 * num_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [3, 16, 64])
def test_the_kernels_give_the_same_bits_with_an_index_that_grew_in_pieces(head_dim, dtype, target):
    query, key, value = inputs(num_keys=500, rows=2, dtype=dtype, head_dim=head_dim)
    index = KeyIndex(key[:, :, :0])
    for length in (*pieces(500), 333, 32, 65):
        if length < index.length:
            index.crop(length)
        index.append(key[:, :, :length])
        given = attend(query, key[:, :, :length], value[:, :, :length], index, k=9, return_selection=True)
        wanted = attend(query, key[:, :, :length], value[:, :, :length], None, k=9, return_selection=True)
        assert torch.equal(given[0], wanted[0])
        assert all(map(torch.equal, given[1], wanted[1]))


@pytest.mark.parametrize("made_by", cpu.cpu_targets())
def test_an_index_serves_the_kernels_of_every_instruction_set(made_by, target):
    query, key, value = inputs(num_keys=700, head_dim=20)
    with cpu.forced_cpu_target(made_by):
        index = KeyIndex(key[..., :500, :])
    index.append(key)  # the rest is indexed by the kernels that read it
    assert torch.equal(attend(query, key, value, index), attend(query, key, value, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.rand(3, 1, 1, 500) < 0.7, "is_causal": True},
        {"bias": torch.randn(4, 2, 500)},
        {"k": [1, 30, 200, 499]},
    ],
    ids=["plain", "causal", "masked", "biased", "k of heads"],
)
def test_the_kernels_complete_with_the_same_bits(options, dtype, target):
    query, key, value = inputs(num_keys=500, rows=2, dtype=dtype)
    if "bias" in options:
        options = options | {"bias": options["bias"].to(dtype)}
    options = {"k": 9, "completion": Completion([0.5, 1.0, 2.0, 0.0]), "return_selection": True} | options
    index = KeyIndex(key)
    for spoiled in (False, True):
        if spoiled:  # a query that sees it is NaN
            key[0, 0, 77], value[1, 1, 99] = torch.nan, torch.inf
            index = KeyIndex(key)
        given, wanted = (attend(query, key, value, of, **options) for of in (index, None))
        assert torch.equal(given[0].nan_to_num(7), wanted[0].nan_to_num(7))
        for one, other in zip(given[1], wanted[1], strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_the_kernels_follow_beams_and_copies(target):
    query, key, value = inputs(num_keys=300)
    index, order = KeyIndex(key), torch.tensor([2, 0, 2, 1])
    twin = index.copy()
    index.reorder(order)
    more = torch.cat([key[order], key[order][:, :, :70]], dim=2)
    index.append(more)
    values = torch.cat([value[order], value[order][:, :, :70]], dim=2)
    assert torch.equal(attend(query[order], more, values, index), attend(query[order], more, values, None))
    assert torch.equal(attend(query, key, value, twin), attend(query, key, value, None))


def test_the_kernels_find_keys_that_changed_where_no_version_tells(target):
    with torch.inference_mode():
        query, key, value = (x.clone() for x in inputs(num_keys=300))
        index = KeyIndex(key)
        key.mul_(-3)
        with pytest.raises(RuntimeError, match="key_index is not of these keys"):
            attend(query, key, value, index)
