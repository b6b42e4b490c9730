"""A small T5 to train from scratch: a generated reading task, a tokenizer of its words, and the untrained model.

All are written as ordinary files, so that training, evaluation and fine-tuning work as for any model and any set.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.pretrained import Say
from ..models.text import read_text
from ..runs.checks import check_at_least
from ..runs.records import write_json, write_whole
from ..runs.training import check_heads
from .tasks import Question
from .tasks.reading_task import KINDS, Words, make_questions, share_right_at_random
from .tasks.unifiedqa import input_text, target_text

# Kinds of question in the files for the first training and in those for fine-tuning.
FIRST_KINDS, NEW_KINDS = ("what", "where"), ("who",)
MODEL_FOLDER = "small-t5"


@dataclass(frozen=True)
class SmallReaderConfig:
    """
    words      number of words of each of three kinds, taken from the text
    facts      fewest and most facts of a paragraph
    forms      number of sentence forms that state facts
    num_train  questions of a training file
    num_test   questions of a test file
    """

    text: Path | None = None
    words: int = 16
    facts: tuple[int, int] = (1, 3)
    forms: int = 1
    num_train: int = 200_000
    num_test: int = 500
    d_model: int = 64
    d_ff: int = 256
    num_layers: int = 2
    num_heads: int = 4
    seed: int = 0
    out: Path = Path("results/qa/work/reading")

    def __post_init__(self) -> None:
        check_at_least(1, self, "words", "num_train", "num_test", "d_model", "d_ff", "num_layers", "num_heads")
        check_heads(self)


def make_small_reader(config: SmallReaderConfig, say: Say) -> None:
    """Write training and test files for both kinds of question, and an untrained T5 with its tokenizer.

    Raises:
        ValueError: the text has too few words, or facts do not fit.
        FileNotFoundError: there is no such text.
    """
    text = read_text(config.text)
    words = Words.of(text.content, config.words)
    everything: list[Question] = []
    questions: list[Question] = []
    files = (
        ("train.jsonl", config.num_train, FIRST_KINDS),
        ("test.jsonl", config.num_test, FIRST_KINDS),
        ("new-kind-train.jsonl", config.num_train, NEW_KINDS),
        ("new-kind-test.jsonl", config.num_test, NEW_KINDS),
    )
    for turn, (name, number, kinds) in enumerate(files):
        # No test question occurs in the training file.
        trained_on = questions if turn % 2 else []
        questions = make_questions(
            words,
            number,
            kinds=kinds,
            facts=config.facts,
            forms=config.forms,
            seed=4 * config.seed + turn,
            without=trained_on,
        )
        rows = (json.dumps({name: value for name, value in asdict(q).items() if value}) for q in questions)
        write_whole(config.out / name, "".join(f"{row}\n" for row in rows))
        everything += questions
        say(
            f"Written: {config.out / name} ({number:,} questions: {', '.join(kinds)}; "
            f"a fact at random is right for {100 * share_right_at_random(questions):.1f} %)"
        )
    tokenizer = _new_tokenizer(everything)
    _new_t5(config, len(tokenizer)).save_pretrained(config.out / MODEL_FOLDER)
    tokenizer.save_pretrained(config.out / MODEL_FOLDER)
    about = {"text": text.source, "text_sha256": text.sha256, "facts": config.facts, "forms": config.forms}
    write_json(config.out / "about.json", about | {"words": asdict(words), "kinds": KINDS, "seed": config.seed})
    say(f"Written: {config.out / MODEL_FOLDER} ({len(tokenizer)} words)")


def _new_tokenizer(questions: list[Question]) -> Any:
    """A tokenizer with one token a word, and </s> at the end of a text as T5 has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"])
    tokenizer.train_from_iterator((f"{input_text(q)} {target_text(q)}" for q in questions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _new_t5(config: SmallReaderConfig, vocabulary: int) -> Any:
    """A T5 with ReLU feed-forward layers, relative position biases and no dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(config.seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=config.d_model,
            d_kv=config.d_model // config.num_heads,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
