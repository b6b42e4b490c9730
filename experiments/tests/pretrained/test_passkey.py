import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.models.pretrained import find_model, load_model_to_run
from topk_experiments.models.settings import Setting
from topk_experiments.pretrained.passkey import PasskeyConfig, _filling_text, ask, prompts_of
from topk_experiments.pretrained.passkey_report import SCHEMA, report, table_rows
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


@pytest.fixture(params=["text", "sentences"])
def config(request, tiny_model, text_file):
    text = text_file if request.param == "text" else None
    return PasskeyConfig(model=str(tiny_model), text=text, filler=request.param, num_tokens=200, depths=4)


@pytest.fixture
def prompts(config):
    return prompts_of(config, find_model(config.model), _filling_text(config))


def test_every_prompt_has_the_same_length_and_its_passkey_at_its_depth(config, prompts):
    """The tiny tokenizer knows no digits: the needle is the <unk> in it."""
    assert {len(prompt.before) + len(prompt.after) + len(prompt.answer) for prompt in prompts} == {200}
    lengths = [len(prompt.before) for prompt in prompts]
    assert lengths == sorted(set(lengths))
    for shallow, deep in itertools.pairwise(prompts):
        assert deep.before[: len(shallow.before)] == shallow.before
        needle = len(shallow.after) + len(shallow.before) - len(deep.before)
        assert shallow.after[-20:] == deep.after[-20:]
        assert needle <= len(shallow.after)
    assert len({config.passkey(depth) for depth in range(50)}) > 40
    assert all(len(config.passkey(depth)) == 5 for depth in range(50))


@pytest.mark.parametrize(
    "setting", [Setting(), Setting(attention_k=4), Setting(attention_k=4, completed=True)], ids=str
)
def test_reading_on_from_a_shared_beginning_answers_as_reading_each_prompt_anew(config, prompts, setting, tiny_model):
    request = {
        "model": vars(find_model(str(tiny_model))),
        "convert": setting.for_convert(),
        "threads": 1,
        "seed": 0,
        "backend": "chunked",
    }

    def answers(chosen):
        sent = []
        ask(request | {"prompts": {str(depth): vars(prompts[depth]) for depth in chosen}}, sent.append)
        return {one["depth"]: one for one in sent}

    together = answers(range(4))
    assert list(together) == [0, 1, 2, 3]
    for depth in range(4):
        alone = answers([depth])[depth]
        assert [together[depth][name] for name in ("found", "ranks")] == [alone[name] for name in ("found", "ranks")]
        assert together[depth]["log_probabilities"] == pytest.approx(alone["log_probabilities"], rel=1e-4)
    if setting.is_full:
        model = load_model_to_run(find_model(str(tiny_model)))
        for depth, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.before + prompt.after + prompt.answer])
            logits = model(input_ids=ids).logits[0, -len(prompt.answer) - 1 : -1]
            wanted = torch.tensor(prompt.answer)
            chances = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
            order = logits.argsort(-1, descending=True)
            ranks = [(order[i] == token).nonzero().item() for i, token in enumerate(prompt.answer)]
            assert (together[depth]["found"], together[depth]["ranks"]) == (not any(ranks), ranks)
            assert together[depth]["log_probabilities"] == pytest.approx(chances, rel=1e-4)


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    options = {"model": tiny_model, "text": text_file, "out": tmp_path / "out", "tokens": 100, "threads": 1}
    options |= {"filler": "text", "k": "4", "completed-k": "", "depths": 3}
    return ["passkey", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.mark.usefixtures("in_this_process")
def test_it_runs_from_start_to_end_and_asks_only_for_what_is_missing(arguments, tmp_path):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "out" / "passkey.jsonl"
    records = read_json_lines(path)
    assert [record["point"]["depth"] for record in records] == [0, 1, 2] * 2
    assert [record["point"]["setting"]["attention_k"] for record in records] == [None] * 3 + [4] * 3
    assert str(tmp_path) not in path.read_text()
    table = (tmp_path / "out" / "passkey.md").read_text()
    assert (
        "| attention | found | digits first | log-probability of a digit | 0% | 33% | 67% | seconds a depth |" in table
    )
    assert "| attention k = 4 |" in table

    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    again = runner.invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert "full: on file, of" in again.output
    assert "attention k = 4, depth 67%" in again.output
    assert "depth 33%" not in again.output
    assert len(read_json_lines(path)) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "30"], "error: tokens must be at least"),
        (["--tokens", "513"], "error: tokens must be at most 512, the longest input of tiny-llama, got 513"),
        (["--tokens", "490"], "is too short"),
        (["--k", "0"], "error: k must be at least 1 and below 2^31, got 0"),
        (["--depths", "0"], "error: depths must be at least 1, got 0"),
        (["--filler", "noise"], "error: filler must be one of text, sentences, got 'noise'"),
        (["--frame", "letter"], "error: frame must be one of chat, plain, got 'letter'"),
        (["--filler", "sentences"], "error: text is for filler"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, options, words):
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert words in result.output


def test_the_table_counts_what_was_found(tmp_path):
    environment = {"cpu": "a", "torch": "2", "date": "2026-11-30", "commit": None}
    point = {"depths": 2, "model": ["m", "1"], "text": ["t", "1"], "filler": "text", "frame": "plain", "threads": 2}
    records = [
        {
            "schema": SCHEMA,
            "point": point
            | {"num_tokens": length, "depth": depth, "setting": {"attention_k": k, "feed_forward_k": None}},
            "found": k is None or depth == 1,
            "ranks": [0, 0] if k is None or depth == 1 else [1, 0],
            "log_probabilities": [-0.5, -1.0 - length],
            "elapsed_s": 2.0 + depth,
            "environment": environment,
        }
        for length in (9, 99)
        for k in (None, 64)
        for depth in (0, 1)
    ]
    assert table_rows(records[:4])[1:] == [
        ["full", "2 of 2", "100%", "-5.25", "2", "2", "2.5"],
        ["attention k = 64", "1 of 2", "75%", "-5.25", "1", "2", "2.5"],
    ]
    (tmp_path / "passkey.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = report(tmp_path)[0].read_text()
    assert table.count("| full | 2 of 2 |") == 2
    assert table.index("passkey of five digits in 9 tokens of t, without a template") < table.index("in 99 tokens")
