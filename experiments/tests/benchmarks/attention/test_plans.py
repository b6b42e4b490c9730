import pytest

from topk_experiments.benchmarks.attention import ROUNDS
from topk_experiments.benchmarks.attention.works import TABLE


def test_the_table_has_all_rows_and_ours_comes_first():
    name, plan = ROUNDS.plan("reference")
    assert name == "table"
    assert list(plan) == list(TABLE.values())
    assert plan[TABLE["plain"]] == ("topk-reference", "sdpa", "topk-chunked", "query-chunks", "performer")


def test_with_its_own_backend_chunked_is_named_once():
    _, plan = ROUNDS.plan("chunked", works=["causal"])
    assert plan == {TABLE["causal"]: ("topk-chunked", "sdpa", "query-chunks", "performer")}


def test_the_sweep_over_length_leaves_chunked_out_beyond_16384_unless_it_is_ours():
    _, plan = ROUNDS.plan("reference", sweep="length", sizes=[32768, 16384])
    assert [(work.length, "topk-chunked" in methods) for work, methods in plan.items()] == [
        (16384, True),
        (32768, False),
    ]
    _, plan = ROUNDS.plan("chunked", sweep="length", sizes=[32768])
    assert [methods[0] for methods in plan.values()] == ["topk-chunked"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"sweep": "heads"}, "sweep must be among length, k, got 'heads'"),
        ({"works": ["huge"]}, "works must be among plain, .*, got 'huge'"),
        ({"works": ["plain"], "sweep": "k"}, "works chooses rows of the table"),
        ({"sizes": [64]}, "sizes must go with a sweep"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        ROUNDS.plan("chunked", **choice)
