import pytest

from topk_experiments.rivals import METHODS, new_attention
from topk_experiments.rivals.names import among, check_method, kept, method_of, split_backend


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_table_is_a_module_and_drops_unless_it_is_random(name):
    attention = new_attention(name, head_dim=4, k=2)
    assert attention.can_drop != METHODS[name].is_random


def test_a_backend_in_a_name_does_not_make_another_method():
    assert method_of("topk-reference") is METHODS["topk"]
    assert split_backend("topk-elsewhere") == ("topk-elsewhere", None)
    assert split_backend("topk-completed") == ("topk-completed", None)
    assert [kept(name, 8) for name in ("topk", "topk-cpu", "topk-completed", "sdpa")] == [8, 8, 8, None]


def test_methods_are_chosen_by_what_is_true_of_them():
    assert among(METHODS, takes_bias=True) == ("topk", "topk-completed", "query-chunks", "sdpa")
    assert among(["rfa", "topk-chunked"], is_random=False) == ("topk-chunked",)


def test_a_method_that_does_not_exist_is_refused_with_those_that_do():
    check_method("sdpa", ["sdpa"])
    check_method("topk-chunked", ["sdpa"])
    with pytest.raises(ValueError, match=r"^methods must be topk-BACKEND or among sdpa, rfa, got 'dense'$"):
        check_method("dense", ["sdpa", "rfa"])
    with pytest.raises(ValueError, match="backend"):
        check_method("topk-elsewhere", ["sdpa"])
