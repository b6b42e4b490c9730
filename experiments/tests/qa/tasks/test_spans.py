import pytest
import torch

from topk_experiments.qa.tasks import Question
from topk_experiments.qa.tasks.spans import (
    MAX_ANSWER_TOKENS,
    Window,
    best_span,
    marked_answers,
    pad_windows,
    read_windows,
    target_tokens,
)

PASSAGE = "Ann had  a red hat; Bob had a blue one. Then both went home, and nobody saw Ann's hat again."


def asked(answer, passage=PASSAGE, text="Who had what?"):
    return Question(text, (answer,), passage=passage, answer_starts=(passage.index(answer),))


@pytest.fixture
def tokenizer():
    """BERT's frame around words and punctuation: <cls> question <sep> passage <sep>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([PASSAGE, "Who had what?"], trainers.WordLevelTrainer(special_tokens=SPECIAL))
    words.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(token, number) for number, token in enumerate(SPECIAL)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>"]


class Marks:
    """A model whose logits are highest at given tokens (start, end) of each window, in its input's order."""

    def __init__(self, tokens_of):
        self.tokens_of = tokens_of

    def __call__(self, input_ids, attention_mask, token_type_ids=None):
        self.start_logits, self.end_logits = (torch.randn(input_ids.shape) for _ in range(2))
        for row, ids in enumerate(input_ids.tolist()):
            for logits, token, score in zip(
                (self.start_logits, self.end_logits), *self.tokens_of(ids, attention_mask[row]), strict=True
            ):
                logits[row, token] = score
        return self


@pytest.mark.parametrize("answer", ["Ann", "a red hat", "Bob had a blue one", "Ann's", "again", "."])
def test_targets_mark_the_answer_in_every_window_that_holds_it_whole(answer, tokenizer):
    question = asked(answer)
    windows = read_windows({7: question}, tokenizer, max_length=20, stride=6)
    assert len(windows) > 1
    marked = 0
    for window in windows:
        assert window.question == 7
        first, last = target_tokens(window, question)
        if (first, last) == (0, 0):
            continue
        begin, end = window.offsets[first - window.first][0], window.offsets[last - window.first][1]
        assert PASSAGE[begin:end] == answer
        assert begin == question.answer_starts[0]
        marked += 1
    assert marked >= 1
    whole = read_windows({7: question}, tokenizer)
    assert len(whole) == 1
    assert target_tokens(whole[0], question) != (0, 0)


def test_an_answer_inside_a_word_marks_the_word(tokenizer):
    question = asked("ome")
    (window,) = read_windows({0: question}, tokenizer)
    first, last = target_tokens(window, question)
    assert first == last
    assert PASSAGE[slice(*window.offsets[first - window.first])] == "home"


def test_the_best_span_is_that_of_all_pairs_in_order_and_not_too_long():
    window = Window(0, {"input_ids": [0] * 60}, 5, tuple((n, n + 1) for n in range(50)))
    for seed in range(5):
        starts, ends = torch.randn(2, 60, generator=torch.Generator().manual_seed(seed))
        expected = max(
            (starts[5 + i] + ends[5 + j], i, j) for i in range(50) for j in range(i, min(50, i + MAX_ANSWER_TOKENS))
        )
        score, first, last = best_span(window, starts, ends)
        assert (first, last) == expected[1:]
        assert score == pytest.approx(expected[0].item())


def test_of_several_windows_the_one_with_the_highest_score_answers(tokenizer):
    question = asked("hat again")
    windows = read_windows({0: question}, tokenizer, max_length=20, stride=6)
    targets = [target_tokens(window, question) for window in windows]
    inputs = [window.inputs["input_ids"] for window in windows]

    def tokens_of(ids, mask):
        number = inputs.index(ids[: mask.sum()])
        first, last = targets[number]
        # the other windows are sure of themselves too, but less
        return ((first, last), (50.0, 50.0)) if first else ((windows[number].first,) * 2, (20.0, 20.0))

    answers = list(marked_answers(Marks(tokens_of), tokenizer, {0: question}, max_length=20, stride=6))
    assert answers == [{0: "hat again"}]


def test_questions_come_in_batches_that_keep_windows_together(tokenizer):
    short, long = asked("red", "Ann had a red hat"), asked("red")
    questions = {3: short, 4: long, 5: short}
    model = Marks(lambda ids, mask: ((0,) * 2, (0.0,) * 2))
    batches = list(marked_answers(model, tokenizer, questions, max_length=20, stride=6, max_batch_tokens=30))
    assert [sorted(batch) for batch in batches] == [[4], [3, 5]]
    assert all(answer in questions[number].passage for batch in batches for number, answer in batch.items())


def test_padding_is_masked(tokenizer):
    windows = read_windows({0: asked("red", "Ann had a red hat"), 1: asked("red")}, tokenizer)
    padded = pad_windows(windows, tokenizer)
    assert padded["attention_mask"].sum(-1).tolist() == [window.num_tokens for window in windows]


def test_what_cannot_be_marked_is_named(tokenizer):
    with pytest.raises(ValueError, match="a span model needs a passage to mark, this question has none: 'Who\\?'"):
        read_windows({0: Question("Who?", ("Ann",))}, tokenizer)
    with pytest.raises(ValueError, match="max_length must be at least 14 for 'Who had what\\?', got 12"):
        read_windows({0: asked("red")}, tokenizer, max_length=12, stride=6)
    unmarked = Question("Who?", ("Ann",), passage=PASSAGE)
    (window,) = read_windows({0: unmarked}, tokenizer)
    with pytest.raises(ValueError, match="answers must have their first characters to train a span model: 'Who\\?'"):
        target_tokens(window, unmarked)
