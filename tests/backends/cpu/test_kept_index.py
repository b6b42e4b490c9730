"""A kept index of keys saves reading most of them. It changes no bit."""

import pytest
import torch

from adversarial import FAMILIES
from topk_attention.backends import cpu

operators = torch.ops.topk_attention
PANEL = 32  # keys of a panel


class Index:
    """The tensors of an index of keys [B, G, M, D], with room for more."""

    def __init__(self, key, spare_panels=1):
        batch, heads, num_keys, dim = key.shape
        self.key, panels = key, -(-num_keys // PANEL) + spare_panels
        self.panels = torch.full((batch, heads, panels, operators.cpu_index_panel_bytes(dim)), 77, dtype=torch.uint8)
        self.numbers = torch.full((batch, heads, panels, 4), torch.nan)
        self.unscreened = torch.full((batch, heads, panels), -1, dtype=torch.int32)
        self.centre = torch.full((batch, heads, -(-dim // 4) * 4), torch.nan)

    @property
    def tensors(self):
        return self.panels, self.numbers, self.unscreened, self.centre

    def write(self, start, end):
        operators.cpu_index_keys(self.key[:, :, :end], start, *self.tensors)
        return self


def inputs_of(
    query,
    key,
    value,
    k,
    attn_mask=None,
    bias=None,
    relative_bias=None,
    is_causal=False,
    dropout=False,
    sinks=None,
    softcap=0.0,
):
    seed = torch.tensor(11) if dropout else None
    head_k = [k] * query.shape[1] if isinstance(k, int) else k
    scale, dropout_p = query.shape[-1] ** -0.5, 0.3 if dropout else 0.0
    tensors = (query, key, value, attn_mask, bias, relative_bias, sinks, seed)
    return *tensors, head_k, is_causal, scale, softcap, dropout_p, True


def assert_same_bits(few, many):
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def assert_the_index_changes_nothing(index, num_indexed, *args, **options):
    inputs = inputs_of(*args, **options)
    expected = operators.cpu_attention_forward(*inputs)
    assert_same_bits(operators.cpu_attention_forward_indexed(*inputs, *index.tensors, num_indexed), expected)


def built(key):
    return Index(key).write(0, key.shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_keys", [1, 31, 32, 33, 127, 129, 1000, 2100])
def test_an_index_changes_no_bit(cpu_target, num_keys, dtype):
    for heads, queries, dim in (((1, 1), 1, 64), ((6, 2), 1, 33), ((2, 2), 3, 7), ((5, 1), 2, 128), ((16, 1), 1, 20)):
        query = torch.randn(2, heads[0], queries, dim, dtype=dtype)
        key, value = (
            torch.randn(2, heads[1], num_keys, dim, dtype=dtype),
            torch.randn(2, heads[1], num_keys, 5, dtype=dtype),
        )
        for k in sorted({1, min(40, num_keys), num_keys}):
            assert_the_index_changes_nothing(
                built(key), num_keys, query, key, value, k, is_causal=True, dropout=dim == 33
            )


def additions(num_heads, queries, keys):
    full = (1, num_heads, queries, keys)
    noise, chance = torch.randn(full), torch.rand(full)
    yield {}
    yield {"attn_mask": torch.rand(1, 1, 1, keys) < 0.7, "is_causal": True}
    yield {"attn_mask": torch.where(chance < 0.2, -torch.inf, 30 * noise)}
    yield {"attn_mask": torch.where(chance < 0.5, torch.finfo(torch.float32).min, 0)}
    yield {"bias": noise, "attn_mask": torch.rand(1, 1, queries, keys) < 0.02}
    yield {"attn_mask": torch.where(chance < 0.5, -1e9, noise)}
    yield {"attn_mask": torch.where(chance < 0.98, -1e9 * (1 + chance), noise)}
    yield {"attn_mask": torch.where(chance < 0.5, -1000 - noise, torch.where(chance < 0.9, -500 - noise, noise))}
    yield {"attn_mask": torch.full(full, -2000.0)}
    yield {"relative_bias": torch.randn(num_heads, queries + keys - 1)}
    yield {"bias": torch.where(chance < 0.01, torch.nan, torch.where(chance < 0.02, torch.inf, noise * 1e30))}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_index_misses_no_key_whatever_misleads_it(cpu_target, family):
    query, key = FAMILIES[family](torch.randn(1, 4, 2, 37), torch.randn(1, 2, 900, 37))
    value, index = torch.randn(1, 2, 900, 5), built(key)
    for options in additions(4, 2, 900):
        for k in (1, 50, [300, 20, 5, 900]):
            assert_the_index_changes_nothing(index, 900, query, key, value, k, **options)


@pytest.mark.parametrize("k", [20, 300, [20, 1400, 20, 1600, 1, 700]])
def test_rows_whose_bounds_exclude_too_little_are_right_beside_others(cpu_target, several_threads, k):
    """Rows of three kinds: of ties, of zeros, and of scores that bounds tell apart."""
    query, key, value = torch.randn(1, 6, 2, 40), torch.randn(1, 2, 5000, 40), torch.randn(1, 2, 5000, 8)
    key[..., 0] = 1
    query[:, ::2, 0] = query[:, 1, 1] = torch.eye(40)[0]
    query[:, 4, 1] = query[:, 5] = 0
    index = built(key)
    inputs = inputs_of(query, key, value, k, is_causal=True)
    expected = operators.cpu_attention_forward(*inputs)
    for result in several_threads(lambda: operators.cpu_attention_forward_indexed(*inputs, *index.tensors, 5000)):
        assert_same_bits(result, expected)


def test_an_index_may_grow_in_any_pieces_and_be_cropped(cpu_target):
    query, key, value = torch.randn(2, 6, 1, 40), torch.randn(2, 3, 700, 40), torch.randn(2, 3, 700, 8)
    index, start = Index(key, spare_panels=5), 0
    for end in (1, 2, 33, 64, 65, 200, 203, 699, 700):
        index.write(start, end)
        assert_the_index_changes_nothing(index, end, query, key[:, :, :end], value[:, :, :end], 20)
        start = end
    # Other keys follow those that are left.
    key[:, :, 150:] = torch.randn(2, 3, 550, 40)
    index.write(150, 400)
    assert_the_index_changes_nothing(index, 400, query, key[:, :, :400], value[:, :, :400], 20)
    # Fewer keys than are indexed, and more.
    for end, num_indexed in ((90, 400), (700, 400), (400, 0)):
        assert_the_index_changes_nothing(index, num_indexed, query, key[:, :, :end], value[:, :, :end], 20)


def test_an_index_grown_key_by_key_is_the_one_built_at_once_but_for_its_centre(cpu_target):
    key = torch.randn(1, 2, 100, 24)
    grown = Index(key).write(0, 100)
    others = [x.clone() for x in grown.tensors]
    for end in range(51, 101):
        grown.write(end - 1, end)
    for one, other in zip(grown.tensors, others, strict=True):
        assert torch.equal(one[:, :, :4].nan_to_num(7), other[:, :, :4].nan_to_num(7))


def test_an_index_does_not_depend_on_the_number_of_threads(several_threads):
    query, key, value = torch.randn(1, 6, 2, 40), torch.randn(1, 2, 5000, 40), torch.randn(1, 2, 5000, 8)
    key[:, :, 77] = torch.inf

    def run():
        index = built(key)
        inputs = inputs_of(query, key, value, 50, is_causal=True)
        return *index.tensors, *operators.cpu_attention_forward_indexed(*inputs, *index.tensors, 5000)

    first, *others = several_threads(run)
    for other in others:
        assert_same_bits(other, first)


def test_an_index_of_other_keys_is_an_error(cpu_target):
    query, key, value = torch.randn(1, 2, 1, 40), torch.randn(1, 2, 500, 40), torch.randn(1, 2, 500, 8)
    index = built(torch.randn_like(key))
    with pytest.raises(RuntimeError, match="key_index is not of these keys"):
        operators.cpu_attention_forward_indexed(*inputs_of(query, key, value, 20), *index.tensors, 500)


def test_an_index_of_another_shape_is_refused():
    key = torch.randn(1, 2, 500, 40)
    inputs = inputs_of(torch.randn(1, 2, 1, 40), key, key, 20)
    for index in (built(key[..., :32]), built(key[:, :1])):
        with pytest.raises(RuntimeError, match="panels does not have the shape, dtype or layout of an index"):
            operators.cpu_attention_forward_indexed(*inputs, *index.tensors, 500)
    with pytest.raises(RuntimeError, match="an index of 2 panels holds 64 keys, not 500"):
        operators.cpu_attention_forward_indexed(*inputs, *built(key[:, :, :20]).tensors, 500)


def test_calls_that_no_index_serves_are_right_all_the_same(cpu_target):
    """Many rows of a key head, and float64."""
    query, key, value = torch.randn(1, 2, 17, 40), torch.randn(1, 2, 500, 40), torch.randn(1, 2, 500, 8)
    assert_the_index_changes_nothing(built(key), 500, query, key, value, 20)
    index = built(key)
    assert_the_index_changes_nothing(index, 500, query.double(), key.double(), value.double(), 20)


def test_an_index_takes_one_byte_a_number_and_20_a_panel():
    assert [operators.cpu_index_panel_bytes(dim) for dim in (1, 4, 5, 64)] == [128, 128, 256, 2048]
    assert cpu.problem() is None


@pytest.mark.parametrize(
    "hiding",
    [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4, None],
    ids=["inf", "lowest", "-1e9", "-1e4", "bool"],
)
def test_hidden_keys_among_others_do_not_make_the_others_be_read(cpu_target, hiding):
    """Keys that cannot be among the best are spoiled after they were indexed: reading one of them would show."""
    query, value = torch.ones(1, 2, 1, 16), torch.randn(1, 2, 640, 8)
    key = torch.randn(1, 2, 640, 16) * 0.1
    key[:, :, ::32] += 1  # one of each panel
    index = built(key)
    mask = torch.ones(1, 1, 1, 640, dtype=torch.bool)
    mask[..., 5::16] = False  # two of each panel, none of the best
    if hiding is not None:
        mask = torch.where(mask, 0.0, hiding)
    inputs = inputs_of(query, key, value, 10, attn_mask=mask)
    expected = operators.cpu_attention_forward(*inputs)
    spoiled = torch.arange(640) % 32 != 0
    key[:, :, spoiled] = torch.nan
    assert_same_bits(operators.cpu_attention_forward_indexed(*inputs, *index.tensors, 640), expected)
