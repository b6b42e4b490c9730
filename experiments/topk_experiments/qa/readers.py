"""The three ways in which models answer: by choosing, by writing, or by marking a span of the passage.

A reader holds three things: how to ask a loaded model (in the process that holds the model), how to score the answers
(in any process), and, if its models can be trained, the loss of training questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.pretrained import ModelNotFoundError
from ..models.settings import mean_k
from ..runs.records import Json
from .tasks.generation import MAX_NEW_TOKENS, generated_answers, share_in_longer_inputs
from .tasks.likelihood import choice_log_likelihoods
from .tasks.prompts import PROMPT_VERSION, choice_prompts, share_that_sees_more_keys
from .tasks.questions import Question
from .tasks.scores import exact_match, f1, mean_and_error
from .tasks.spans import MAX_LENGTH, STRIDE, marked_answers, pad_windows, read_windows, target_tokens
from .tasks.unifiedqa import input_text, target_text

# Batch by batch: number of a question -> its answer.
Batches = Iterator[Mapping[int, Any]]


@dataclass(frozen=True)
class Lengths:
    """
    tokens          for every question, tokens of its longest sequence
    share_beyond_k  k -> share of the queries that see more than k keys; for all others attention is full
    """

    tokens: Sequence[int]
    share_beyond_k: Callable[[float], float]

    def describe(self, attention_k: Any) -> Json:
        """For records; attention_k in the form of `Setting.describe`."""
        result = {"mean_tokens": sum(self.tokens) / len(self.tokens), "most_tokens": max(self.tokens)}
        k = mean_k(attention_k)
        return result if k is None else result | {"share_beyond_k": self.share_beyond_k(k)}


@dataclass(frozen=True)
class TrainingExamples:
    """The examples that a model is trained on.

    lengths  tokens of the input of every example
    weights  weight of every example in a mean: its tokens to predict, or 1
    loss     numbers of examples, from 0 -> the weighted mean of their losses
    """

    lengths: Sequence[int]
    weights: Sequence[int]
    loss: Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Reader:
    """
    auto_class  of transformers
    protocol    everything else that decides the answers, for records
    takes_examples  whether solved examples can stand before a question
    answers     (model, tokenizer, questions by number, examples, shots) -> answers
    lengths     (tokenizer, questions, examples, shots) -> lengths of the sequences
    outcomes    (questions, answers) -> name -> one number a question; the score is their mean
    training    (model, tokenizer, questions) -> training examples; None if such models cannot be trained
    """

    auto_class: str
    protocol: Json
    takes_examples: bool
    answers: Callable[[Any, Any, Mapping[int, Question], Sequence[Question], int], Batches]
    lengths: Callable[[Any, Sequence[Question], Sequence[Question], int], Lengths]
    outcomes: Callable[[Sequence[Question], Sequence[Any]], dict[str, list[float]]]
    training: Callable[[Any, Any, Sequence[Question]], TrainingExamples] | None = None


def reader_name(model_config: Any, *, is_trained: bool = True) -> str:
    """Which of READERS suits a model, by its configuration.

    is_trained  whether the model must already have the head that answers; a BERT to be trained has none yet

    Raises:
        ModelNotFoundError: none of them does.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING

    architectures = " ".join(getattr(model_config, "architectures", None) or ())
    if getattr(model_config, "is_encoder_decoder", False):
        return "text"
    if "ForCausalLM" in architectures or "LMHeadModel" in architectures:
        return "choices"
    if "ForQuestionAnswering" in architectures:
        return "spans"
    if type(model_config) in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        if not is_trained:
            return "spans"
        raise ModelNotFoundError(
            f"a {architectures or model_config.model_type} has no head yet that marks answers: train one with "
            "topk-experiments qa finetune"
        )
    raise ModelNotFoundError(f"no way is known to ask a {architectures or model_config.model_type} questions")


def scores(outcomes: Mapping[str, Sequence[float]]) -> Json:
    """Mean and standard error of every outcome, in per cent."""
    means = {name: mean_and_error(values) for name, values in outcomes.items()}
    return {name: {"value": 100 * mean.value, "error": 100 * mean.error} for name, mean in means.items()}


def _choose(
    model: Any, tokenizer: Any, questions: Mapping[int, Question], examples: Sequence[Question], num_shots: int
) -> Batches:
    prompts = choice_prompts(list(questions.values()), examples, num_shots, tokenizer)
    return choice_log_likelihoods(model, dict(zip(questions, prompts, strict=True)))


def _choice_lengths(
    tokenizer: Any, questions: Sequence[Question], examples: Sequence[Question], num_shots: int
) -> Lengths:
    prompts = choice_prompts(questions, examples, num_shots, tokenizer)
    return Lengths([prompt.num_tokens for prompt in prompts], lambda k: share_that_sees_more_keys(prompts, k))


def _choice_outcomes(questions: Sequence[Question], answers: Sequence[list[float]]) -> dict[str, list[float]]:
    """Whether the most likely choice is right: by log-likelihood, and by log-likelihood over its characters."""
    plain: list[float] = []
    by_length: list[float] = []
    for question, scores_of_choices in zip(questions, answers, strict=True):
        divided = [score / len(c) for score, c in zip(scores_of_choices, question.choices, strict=True)]
        for outcome, values in ((plain, scores_of_choices), (by_length, divided)):
            outcome.append(float(values.index(max(values)) == question.correct))
    return {"accuracy": plain, "accuracy_by_length": by_length}


def _write(model: Any, tokenizer: Any, questions: Mapping[int, Question], *_: object) -> Batches:
    return generated_answers(model, tokenizer, {number: input_text(q) for number, q in questions.items()})


def _text_lengths(tokenizer: Any, questions: Sequence[Question], *_: object) -> Lengths:
    tokens = [len(ids) for ids in tokenizer([input_text(question) for question in questions])["input_ids"]]
    return Lengths(tokens, lambda k: share_in_longer_inputs(tokens, k))


def _text_training(model: Any, tokenizer: Any, questions: Sequence[Question]) -> TrainingExamples:
    inputs = tokenizer([input_text(question) for question in questions])["input_ids"]
    targets = tokenizer(text_target=[target_text(question) for question in questions])["input_ids"]

    def loss(numbers: Sequence[int]) -> Tensor:
        padded = tokenizer.pad({"input_ids": [inputs[number] for number in numbers]}, return_tensors="pt")
        labels = [torch.tensor(targets[number]) for number in numbers]
        return model(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            labels=torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        ).loss

    return TrainingExamples([len(ids) for ids in inputs], [len(ids) for ids in targets], loss)


def _mark(model: Any, tokenizer: Any, questions: Mapping[int, Question], *_: object) -> Batches:
    return marked_answers(model, tokenizer, questions)


def _span_lengths(tokenizer: Any, questions: Sequence[Question], *_: object) -> Lengths:
    tokens = [window.num_tokens for window in read_windows(dict(enumerate(questions)), tokenizer)]
    return Lengths(tokens, lambda k: share_in_longer_inputs(tokens, k))


def _span_training(model: Any, tokenizer: Any, questions: Sequence[Question]) -> TrainingExamples:
    windows = read_windows(dict(enumerate(questions)), tokenizer)
    targets = [target_tokens(window, questions[window.question]) for window in windows]

    def loss(numbers: Sequence[int]) -> Tensor:
        starts, ends = zip(*(targets[number] for number in numbers), strict=True)
        return model(
            **pad_windows([windows[number] for number in numbers], tokenizer),
            start_positions=torch.tensor(starts),
            end_positions=torch.tensor(ends),
        ).loss

    return TrainingExamples([window.num_tokens for window in windows], [1] * len(windows), loss)


def _match(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[float]]:
    """SQuAD's exact match and F1, each for the right answer that fits best."""
    pairs = [(answer, question.answers) for question, answer in zip(questions, answers, strict=True)]
    return {"exact_match": [exact_match(*pair) for pair in pairs], "f1": [f1(*pair) for pair in pairs]}


READERS = {
    "choices": Reader(
        "AutoModelForCausalLM",
        {"prompt": PROMPT_VERSION, "choices": "by likelihood"},
        True,
        _choose,
        _choice_lengths,
        _choice_outcomes,
    ),
    "text": Reader(
        "AutoModelForSeq2SeqLM",
        {"prompt": "UnifiedQA's", "most_new_tokens": MAX_NEW_TOKENS},
        False,
        _write,
        _text_lengths,
        _match,
        _text_training,
    ),
    "spans": Reader(
        "AutoModelForQuestionAnswering",
        {"window": MAX_LENGTH, "stride": STRIDE},
        False,
        _mark,
        _span_lengths,
        _match,
        _span_training,
    ),
}
