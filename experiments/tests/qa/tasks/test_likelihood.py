"""Reading a prefix once for all, a question once for all its choices: the same numbers as each sequence by itself."""

import re

import pytest
import torch

from topk_attention import convert
from topk_experiments.qa.tasks import Question
from topk_experiments.qa.tasks.likelihood import _CALL_TOKENS, choice_log_likelihoods, padded_groups
from topk_experiments.qa.tasks.prompts import Prompt, choice_prompts, share_that_sees_more_keys

VOCABULARY = 40


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def prompts():
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())

    prefixes = ids(11), ids(9), ()
    sizes = [(5, (1, 2, 3)), (5, (4, 1)), (8, (1, 1)), (5, (2, 2)), (3, (6, 2, 1, 1))]
    return {
        10 * number: Prompt(prefixes[number % 3], ids(context), tuple(map(ids, choices)))
        for number, (context, choices) in enumerate(sizes + sizes)
    }


def one_by_one(model, prompt):
    """Each choice by itself, from its whole sequence."""
    scores = []
    for choice in prompt.choices:
        ids = torch.tensor([prompt.prefix + prompt.context + choice])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].float().log_softmax(-1)
        predicted = log_probabilities[-1 - len(choice) : -1].gather(-1, torch.tensor(choice)[:, None])
        scores.append(predicted.sum().item())
    return scores


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize("ks", [{}, {"attention_k": 4}, {"attention_k": 4, "feed_forward_k": 6}], ids=str)
def test_choices_score_as_whole_sequences_do(family, ks):
    model = family()
    if ks:
        convert(model, **ks)
    asked = prompts()
    scores = {n: s for batch in choice_log_likelihoods(model, asked, max_cached_tokens=60) for n, s in batch.items()}
    assert scores.keys() == asked.keys()
    for number, prompt in asked.items():
        assert scores[number] == pytest.approx(one_by_one(model, prompt), abs=1e-5), number
        if ks:
            assert prompt.num_tokens > 4


def test_a_batch_holds_equal_lengths_and_no_more_than_fits():
    for batch in choice_log_likelihoods(llama(), prompts(), max_cached_tokens=60):
        chosen = [prompts()[number] for number in batch]
        assert len({(prompt.prefix, len(prompt.context)) for prompt in chosen}) == 1
        assert len(chosen) == 1 or sum(prompt.num_tokens * len(prompt.choices) for prompt in chosen) <= 60


@pytest.mark.parametrize("lengths", [[], [3], [1, 30, 30, 2, 200, 30, 1], [7] * 9, [1, 2, 40, 41, 90], [500, 3, 60]])
def test_padding_costs_as_little_as_any_other_grouping(lengths):
    def cost(groups):
        return sum(_CALL_TOKENS + len(group) * max(lengths[row] for row in group) for group in groups)

    def partitions(rows):
        if not rows:
            yield []
            return
        first, rest = rows[0], rows[1:]
        for chosen in range(2 ** len(rest)):
            group = [first, *(row for place, row in enumerate(rest) if chosen >> place & 1)]
            for others in partitions([row for row in rest if row not in group]):
                yield [group, *others]

    groups = padded_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    if len(lengths) < 8:
        assert cost(groups) == min(map(cost, partitions(list(range(len(lengths))))))
    else:
        assert groups == [list(range(9))]


class Letters:
    """A tokenizer of letters that begins every text with 0 unless told not to."""

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}


def said(*parts):
    return "".join(chr(token) if token else "|" for part in parts for token in part)


def test_examples_come_first_then_the_question_and_every_choice():
    questions = [
        Question("Is it?", ("yes",), ("yes", "no"), "It is."),
        Question("Hot?", ("no",), ("yes", "no")),
        Question("Which?", ("red",), ("red", "blue")),
    ]
    one, other = (
        choice_prompts([question], questions[:2], 1, Letters())[0] for question in (questions[0], questions[2])
    )
    assert said(one.prefix) == "|Question: Hot?\nAnswer: no\n\n"
    assert said(one.context, one.choices[1]) == "It is.\nQuestion: Is it?\nAnswer: no"
    assert said(other.prefix) == "|It is.\nQuestion: Is it?\nAnswer: yes\n\n"
    assert said(other.context, other.choices[0]) == "Question: Which?\nAnswer: red"
    (without_examples,) = choice_prompts(questions[2:], [], 0, Letters())
    assert said(without_examples.prefix, without_examples.context) == "|Question: Which?\nAnswer:"


def test_what_cannot_be_asked_is_named():
    free = Question("Who?", ("Ann",))
    with pytest.raises(ValueError, match="this question has none: 'Who\\?'"):
        choice_prompts([free], [], 0, Letters())
    with pytest.raises(ValueError, match="examples must be at least 4, twice the shots, got 1"):
        choice_prompts([free], [free], 2, Letters())


class EndedLetters(Letters):
    """Ends every text with 1, as T5's tokenizer does."""

    def __call__(self, text, add_special_tokens=True):
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        return {"input_ids": [[*one, 1] for one in ids] if isinstance(text, list) else [*ids, 1]}


class JoinedLetters(Letters):
    """Has one token for a colon with the space and letter after it."""

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, str):
            text = re.sub(": ([a-z])", lambda found: chr(0x1000 + ord(found[1])), text)
        return super().__call__(text, add_special_tokens)


@pytest.mark.parametrize("tokenizer", [EndedLetters(), JoinedLetters()], ids=lambda tokenizer: type(tokenizer).__name__)
def test_a_tokenizer_that_gives_choices_no_tokens_of_their_own_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"must begin with those of the question 'Question: Hot\?\\nAnswer:'; this token"
    ):
        choice_prompts([Question("Hot?", ("no",), ("yes", "no"))], [], 0, tokenizer)


def test_the_share_of_queries_beyond_k_counts_what_each_token_sees():
    asked = list(prompts().values())

    def counted(k):
        seen = []
        for prompt in asked:
            before = len(prompt.prefix)
            seen += range(before + 1, before + len(prompt.context) + 1)
            for choice in prompt.choices:
                first = before + len(prompt.context)
                seen += range(first + 1, first + len(choice) + 1)
        return sum(keys > k for keys in seen) / len(seen)

    for k in (1, 3, 8, 15, 100):
        assert share_that_sees_more_keys(asked, k) == pytest.approx(counted(k))
