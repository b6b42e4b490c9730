import gzip
import json
import sys
import types

import pytest

from local_data import shared_data
from topk_experiments.qa.tasks import Question, read_questions
from topk_experiments.qa.tasks.questions import examples_for
from topk_experiments.qa.tasks.unifiedqa import input_text, parse_line, target_text

FRUIT = Question("Which is a fruit?", ("Apple",), choices=("Stone", "Apple"))
LABELLED = {"choices": {"text": ["Stone", "Apple"], "label": ["A", "B"]}, "answerKey": "B"}
LISTED = {"choices": [{"label": "1", "text": "Stone"}, {"label": "2", "text": "Apple"}]}


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(path, content):
    return read_questions(written(path, content)).questions


@pytest.mark.parametrize(
    "row",
    [
        {"question": FRUIT.text, **LABELLED},
        {"question_stem": FRUIT.text, **LABELLED},
        {"question": {"stem": FRUIT.text, **LISTED}, "answerKey": "2", "id": "x"},
        {"text": FRUIT.text, "answers": ["Apple"], "choices": ["Stone", "Apple"]},
        {
            "instruction": f"Please choose the correct answer to the question: {FRUIT.text}\n\nAnswer1: Stone "
            "Answer2: Apple\n\nAnswer format: answer1/answer2",
            "answer": "answer2",
        },
    ],
    ids=["arc", "openbookqa", "commonsenseqa", "own", "instruction"],
)
def test_rows_of_multiple_choice_sets_as_json_and_as_json_lines(row, tmp_path):
    assert read(tmp_path / "a.json", [row, row]) == (FRUIT, FRUIT)
    assert read(tmp_path / "a.jsonl", f"{json.dumps(row)}\n\n{json.dumps(row)}\n") == (FRUIT, FRUIT)


def test_boolq_asks_with_a_question_mark_and_lists_no_choices(tmp_path):
    row = {"question": "is it hot", "passage": "The sun is hot.", "answer": True}
    (question,) = read(tmp_path / "a.json", [row])
    assert question == Question("is it hot?", ("yes",), ("yes", "no"), "The sun is hot.")
    assert input_text(question) == r"is it hot? \n the sun is hot."
    assert parse_line(f"{input_text(question)}\tyes").choices == ("yes", "no")


def test_squad_nested_and_as_rows(tmp_path):
    answers = [{"text": "Bob", "answer_start": 0}, {"text": "Bob ate", "answer_start": 0}]
    expected = Question("Who ate?", ("Bob", "Bob ate"), passage="Bob ate.", answer_starts=(0, 0))
    paragraph = {"context": "Bob ate.", "qas": [{"question": "Who ate?", "id": "1", "answers": answers}]}
    assert read(tmp_path / "a.json", {"data": [{"paragraphs": [paragraph]}]}) == (expected,)
    row = {"question": "Who ate?", "context": "Bob ate."}
    texts = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
    assert read(tmp_path / "b.json", [row | {"answers": texts}]) == (expected,)
    nothing = {"text": [], "answer_start": []}
    assert read(tmp_path / "c.json", [row | {"answers": nothing}])[0].answers == ("<no answer>",)


def test_mctest_takes_its_answers_from_the_second_file(tmp_path):
    asked = [f"one: Who {n}?\tAnn\tBob\tC\\newlineD\tnobody" for n in range(4)]
    written(tmp_path / "mc.tsv", "\t".join(["mc.0", "Author: 1", r"Ann ate.\newlineThen\tabBob.", *asked]) + "\n")
    written(tmp_path / "mc.ans", "A\tB\tC\tD\n")
    questions = read_questions(tmp_path).questions
    assert [question.answers[0] for question in questions] == ["Ann", "Bob", "C\nD", "nobody"]
    assert (questions[0].text, questions[0].passage) == ("Who 0?", "Ann ate.\nThen\tBob.")


def test_unifiedqa_lines_with_choices_with_a_passage_and_with_both():
    line = "which  is a fruit? \\n (a) stone (b) apple \\n stones are hard.\tapple"
    question = parse_line(line)
    assert question == Question("which  is a fruit?", ("apple",), ("stone", "apple"), "stones are hard.")
    assert f"{input_text(question)}\t{target_text(question)}" == line.replace("  ", " ")
    assert parse_line("who? \\n (a) is a letter.\tann").passage == "(a) is a letter."
    assert parse_line("who?\tann\t \t").answers == ("ann",)
    assert parse_line("which? \\n none\t[1]").answers == ("[1]",)


def test_of_a_folder_the_one_file_that_kept_its_capitals_is_read(tmp_path):
    folder = tmp_path / "fruit"
    folder.mkdir()
    written(folder / "LICENSE.txt", "free")
    written(folder / "test.unifiedqa.tsv", "which is a fruit? \\n (a) stone (b) apple\tapple")
    assert read_questions(folder).questions[0].text == "which is a fruit?"
    written(folder / "test.json", [{"question": FRUIT.text, **LABELLED}])
    some = read_questions(folder)
    assert (some.name, some.questions) == ("fruit/test.json", (FRUIT,))
    written(folder / "dev.json", [])
    with pytest.raises(ValueError, match=r"must hold one data file .*, got dev\.json, test\.json: name the file"):
        read_questions(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"what": 1}], "a row has none of the known sets of fields, got what"),
        ({"what": 1}, "row 1: a row has none of the known sets of fields, got what"),
        ("[1", "has none of the known forms"),
        ("no tab here", "a line must hold an input, a tab and an answer, got 'no tab here'"),
        ("which? \\n (a) x (b) y\tz", "the answer 'z' is not among the choices 'x', 'y'"),
        (
            [{"question": "q", "answerKey": "C", "choices": LABELLED["choices"]}],
            "answerKey must be one of the labels A, B, got 'C'",
        ),
        ([{"question": "q", "passage": "p", "answer": "yes"}], "answer must be true or false, got 'yes'"),
    ],
)
def test_a_file_in_no_known_form_is_named_with_the_reason(content, said, tmp_path):
    with pytest.raises(ValueError, match=r"a\.json has none of the known forms of question files") as error:
        read(tmp_path / "a.json", content)
    assert said in str(error.value)


def test_a_tab_within_a_text_is_refused_with_its_line_and_never_read_as_an_answer(tmp_path):
    path = written(tmp_path / "a.tsv", "who? \\n ann.\tann\nwho? \\n a table\twith a tab.\tbob\n")
    with pytest.raises(ValueError, match=r"a\.tsv has .*: line 2: .* got 2 tabs in 'who\? .*; put a space for a tab"):
        read_questions(path)


def test_the_place_of_what_is_missing_in_squads_form_is_told(tmp_path):
    asked = {"id": "1", "question": "q?", "answers": [{"text": "a"}]}
    good, ropes = {"context": "a", "qas": [asked]}, {"background": "b", "situation": "s", "qas": [asked]}
    place = r"a\.json has .*: article 1, paragraph 2, question 1: "
    with pytest.raises(ValueError, match=f"{place}a paragraph must hold its context, got background and situation"):
        read(tmp_path / "a.json", {"data": [{"paragraphs": [good, ropes]}]})
    with pytest.raises(ValueError, match=f"{place}the field 'context' is missing"):
        read(tmp_path / "a.json", {"data": [{"paragraphs": [good, {"qas": [asked]}]}]})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": 5, "answers": ["a"]}, "row 1: text must be text, got 5"),
        ({"text": "q", "answers": "yes"}, "row 1: answers must be a list, got 'yes'"),
        ({"text": "q", "answers": [None]}, "row 1: an answer must be text, got None"),
        (
            {"instruction": "Q: q\n\nAnswer1: a Answer2: b\n\nAnswer format: x", "answer": "answer0"},
            "answer must be one of",
        ),
        ({"question": "q", "answerKey": "A", "choices": {"label": ["A"], "text": ["a", "b"]}}, "a label for each of 2"),
        (
            {"question": "q", "context": "c", "answers": {"text": "abc"}},
            "the text of answers must be a list, got 'abc'",
        ),
    ],
)
def test_a_row_of_another_type_is_refused_and_never_read_as_something_else(row, said, tmp_path):
    with pytest.raises(ValueError, match=r"a\.json has none of the known forms") as error:
        read(tmp_path / "a.json", [row])
    assert said in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"question file not found: nowhere/x\.json"):
        read_questions("nowhere/x.json")


def test_an_id_is_read_with_the_datasets_package(monkeypatch):
    asked = []

    def load_dataset(identifier, configuration, split):
        asked.append((identifier, configuration, split))
        return [{"question": FRUIT.text, **LABELLED}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    some = read_questions("allenai/ai2_arc:ARC-Easy:test")
    assert (some.name, some.questions) == ("allenai/ai2_arc:ARC-Easy:test", (FRUIT,))
    read_questions("google/boolq::validation")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match="google/boolq::validation needs the package datasets, which is not installed"):
        read_questions("google/boolq::validation")
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test"), ("google/boolq", None, "validation")]


def test_an_order_depends_on_the_seed_alone_and_examples_never_hold_the_question(tmp_path):
    rows = [{"text": f"{n}?", "answers": ["a"]} for n in range(20)]
    some = read_questions(written(tmp_path / "a.json", rows))
    assert some.shuffled(3) == some.shuffled(3) != some.shuffled(4)
    assert sorted(some.shuffled(3), key=some.questions.index) == list(some.questions)
    examples = some.shuffled(3)[:6]
    for question in some.questions:
        shown = examples_for(question, examples, 3)
        assert len(shown) == 3
        assert question not in shown


@pytest.mark.parametrize(
    ("original", "reformatted"),
    [
        ("arc_easy/test.json", "arc_easy/test.unifiedqa.tsv"),
        ("arc_challenge/test.json", "arc_challenge/test.unifiedqa.tsv"),
        ("openbookqa/test.json", "openbookqa/test.unifiedqa.tsv"),
        ("commonsenseqa/dev_rand_split.jsonl", "commonsenseqa/dev.unifiedqa.tsv"),
        ("boolq/boolq_validation.json", "boolq/dev.unifiedqa.tsv"),
        ("squad_xquad_en/xquad.en.json", "squad_xquad_en/test.unifiedqa.tsv"),
        ("mctest/mc500.dev.tsv", "mctest/mc500.dev.unifiedqa.tsv"),
    ],
)
def test_published_files_come_out_as_their_unifiedqa_lines(original, reformatted):
    lines = [" ".join(line.split()) for line in shared_data(reformatted).read_text().splitlines()]
    for file in (original, reformatted):
        questions = read_questions(shared_data(file)).questions
        assert [" ".join(f"{input_text(q)} {target_text(q)}".split()) for q in questions] == lines


BOOLQ = {"question": "is it so", "passage": "first\u2028second \u0085 third", "answer": True}
IS_IT_SO = Question("is it so?", ("yes",), ("yes", "no"), BOOLQ["passage"])


def test_only_line_feeds_end_a_line(tmp_path):
    lines = json.dumps(BOOLQ, ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_bytes(2 * lines.encode())
    assert read_questions(tmp_path / "a.jsonl").questions == (IS_IT_SO, IS_IT_SO)
    (tmp_path / "a.tsv").write_bytes("who? \\n bob\u2028ate.\tbob\r\n".encode())
    assert read_questions(tmp_path / "a.tsv").questions[0].answers == ("bob",)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("number", [1, 2])
def test_lines_of_json_are_read_whatever_the_name_and_with_a_byte_order_mark(name, number, tmp_path):
    lines = "\r\n".join([json.dumps(BOOLQ)] * number)
    (tmp_path / name).write_bytes(lines.encode("utf-8-sig"))
    assert read_questions(tmp_path / name).questions == (IS_IT_SO,) * number
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_questions(tmp_path / f"{name}.gz").questions == (IS_IT_SO,) * number


def test_boolq_of_superglue_calls_its_answer_label(tmp_path):
    row = {name: value for name, value in BOOLQ.items() if name != "answer"}
    for label in (True, 1):
        assert read(tmp_path / "a.json", [row | {"label": label}]) == (IS_IT_SO,)
    with pytest.raises(ValueError, match=r"row 1: label must be true or false, got -1"):
        read(tmp_path / "a.json", [row | {"label": -1}])


def test_hidden_files_in_a_folder_are_left_out(tmp_path):
    written(tmp_path / "dev.jsonl", json.dumps(BOOLQ))
    (tmp_path / "._dev.jsonl").write_bytes(b"\x00\x05\x16\x07\xff")
    assert read_questions(tmp_path).questions == (IS_IT_SO,)


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a.tsv").write_bytes("who? \\n bob.\tbob\nwho? \\n café.\tbob\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.tsv is not UTF-8 \(line 2, byte \d+\); convert it"):
        read_questions(tmp_path / "a.tsv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "a.json holds no questions"),
        ("who? \\n bob.\tbob\nwho left? \\n nobody.\t\n", "line 2: a line must hold an input, a tab and an answer"),
        (json.dumps(BOOLQ) + "\n{", "line 2: "),
        (
            [{"question": "q", "choices": LABELLED["choices"], "answerKey": ""}],
            "test sets are published without answers",
        ),
        ([{"question": "q", "context": None, "answers": {"text": ["a"]}}], "row 1: context must be text, got None"),
        ({"data": [{"paragraphs": [{"qas": [{"question": "q", "answers": []}]}]}]}, "the field 'context' is missing"),
        ([1, 2], "row 1: a row must be a JSON object, got int"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(content, words, tmp_path):
    with pytest.raises(ValueError, match=r"a\.json") as error:
        read(tmp_path / "a.json", content)
    assert words in str(error.value)


def test_numbers_may_be_choices(tmp_path):
    row = {"question": "2 + 2?", "choices": {"text": [4, 5], "label": ["A", "B"]}, "answerKey": "A"}
    assert read(tmp_path / "a.json", [row]) == (Question("2 + 2?", ("4",), ("4", "5")),)


def test_lines_of_unifiedqa_as_others_write_them():
    assert parse_line("which? \\n (a)  Red  (b) blue\tred") == Question("which?", ("Red",), ("Red", "blue"))
    assert parse_line("Which? \\n (A) red (B) blue\tred") == Question("Which?", ("red",), ("red", "blue"))
    assert parse_line('"who ""it""? \\n bob."\t"bob"') == Question('who "it"?', ("bob",), passage="bob.")
    assert parse_line("who? \\n bob.\t['bob', 'ann']").answers == ("bob", "ann")


STORY = "\t".join(
    ["mc.1", "Author: 1;Work Time(s): 2", "A\\newlinestory with \u0085.", *["one: Who?", "w", "x", "y", "z"] * 4]
)


def test_mctest_needs_its_answers_and_no_more(tmp_path):
    (tmp_path / "m.tsv").write_bytes(f"{STORY}\r\n\n\n".encode())
    with pytest.raises(ValueError, match=r"MCTest's answers must be in a file beside it, m\.ans"):
        read_questions(tmp_path / "m.tsv")
    (tmp_path / "m.ans").write_bytes(b"B\tA\tC\tD\r\n\n")
    questions = read_questions(tmp_path / "m.tsv").questions
    assert [question.answers for question in questions] == [("x",), ("w",), ("y",), ("z",)]
    (tmp_path / "m.ans").write_bytes(b"B\tA\tC\tE\n")
    with pytest.raises(ValueError, match="line 1: four choices and one of A, B, C, D are needed"):
        read_questions(tmp_path / "m.tsv")
    (tmp_path / "m.ans").write_bytes(b"B\n" * 2)
    with pytest.raises(ValueError, match=r"m\.ans must hold a line for each of 1 stories, got 2"):
        read_questions(tmp_path / "m.tsv")
