import re

import pytest

from topk_experiments.qa.small_reader import SmallReaderConfig, make_small_reader
from topk_experiments.qa.tasks import read_questions


def test_each_file_is_told_with_what_a_fact_at_random_gets(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abbey abbot baker cabin candle castle dagger damsel engine")
    model = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    said = []
    config = SmallReaderConfig(text, words=3, facts=(1, 3), num_train=2000, num_test=60, **model, out=tmp_path / "out")
    make_small_reader(config, said.append)
    shares = {}
    for line in said[:4]:
        name, share = re.search(r"(\S+\.jsonl) \(.*; a fact at random is right for (\d+\.\d) %\)$", line).groups()
        passages = [question.passage for question in read_questions(config.out / name).questions]
        facts = [len(re.findall(r"the \w+ of \w+ is in the \w+\.", passage)) for passage in passages]
        assert float(share) == pytest.approx(100 * sum(1 / number for number in facts) / len(facts), abs=0.051)
        shares[name.rpartition("/")[2]] = float(share)
    # Every question about a single fact is trained on here, so that none is left for the test.
    assert shares["train.jsonl"] == pytest.approx(61, abs=2)
    assert shares["test.jsonl"] < 50
