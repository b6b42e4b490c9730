"""Perplexity of a small GPT trained from scratch on a text: in full, with top-k attention, with top-k neurons.

All arms have the same initial weights, batches and schedule. The model is transformers' GPT-2 in a small size,
converted like any other model. The last tenth of the text is the validation set; perplexity is measured on all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topk_attention.backends import choose_backend
from topk_attention.functional.words import full_attention_note

from ..models.settings import Setting, convert_model, fixed_attention_k
from ..models.text import Text, read_text
from ..runs.ledger import experiment_environment
from ..runs.process import Send
from ..runs.progress import line_printer
from ..runs.records import Json
from ..runs.training import TrainingPlan, check_model_and_training, random_windows, train, train_arms
from .report import report

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/language-model/1"
DEFAULT_OUT = Path("results/language-model")
TOKENS = ("bytes", "words")
_UNKNOWN, _END_OF_LINE = "<unk>", "<eos>"
# A point of the curve is measured on so many validation windows; the final loss on all of them.
_CURVE_WINDOWS = 32


@dataclass(frozen=True)
class LanguageModelConfig:
    """What is trained and how.

    settings  one arm each
    tokens    "bytes"; or "words", separated by spaces as WikiText counts them, with <eos> at the end of a line and
              <unk> for words that the training part lacks
    context   tokens of a window
    """

    settings: Sequence[Setting]
    text: Path | None = None
    tokens: str = "bytes"
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    d_ff: int = 512
    context: int = 256
    batch: int = 8
    steps: int = 1000
    learning_rate: float = 1e-3
    evaluate_every: int = 100
    threads: int | None = None
    seed: int = 0
    backend: str = "auto"
    out: Path = DEFAULT_OUT
    fresh: bool = False

    def __post_init__(self) -> None:
        check_model_and_training(self)
        if self.tokens not in TOKENS:
            raise ValueError(f'tokens must be "bytes" or "words", got {self.tokens!r}')
        choose_backend(self.backend)

    def as_record(self) -> Json:
        """The fields a record keeps: no files and no arms, and the backend that really runs."""
        left_out = ("text", "out", "fresh", "settings")
        record = {name: value for name, value in asdict(self).items() if name not in left_out}
        threads = self.threads or torch.get_num_threads()
        return record | {"backend": choose_backend(self.backend).name, "threads": threads}


def run_language_model(config: LanguageModelConfig, console: Console) -> Json:
    """Train every arm that is not on file yet, draw the curves, and return the record.

    Raises:
        ValueError: the text is too short, or a k does not fit.
        WorkerError: an arm failed. Finished arms and its last checkpoint are kept.
    """
    text = read_text(config.text)
    training, validation, vocabulary = split_tokens(text, config.tokens)
    for part, tokens in (("training", training), ("validation", validation)):
        if len(tokens) < config.context + 1:
            raise ValueError(
                f"{text.source} is too short: its {part} part must hold {config.context + 1} {config.tokens}, it has "
                f"{len(tokens)}"
            )
    name = f"{Path(text.source).stem.replace(' ', '-')}-{config.tokens}"
    new = {
        "schema": SCHEMA,
        "config": config.as_record(),
        "text": {
            "source": text.source,
            "sha256": text.sha256,
            "training": len(training),
            "validation": len(validation),
            "vocabulary": vocabulary,
        },
        "environment": experiment_environment(Path(__file__).parent),
    }
    shared = {"config": new["config"], "training": training, "validation": validation, "vocabulary": vocabulary}
    requests = {
        str(setting): shared | {"setting": setting.describe(), "convert": setting.for_convert()}
        for setting in config.settings
    }
    path = config.out / f"{name}.json"
    if note := full_attention_note(fixed_attention_k(config.settings), config.context):
        line_printer(console)(note)
    record = train_arms(path, new, requests, f"{__name__}:train_arm", config.steps, console, config.fresh)
    report(record, path, console)
    return record


def split_tokens(text: Text, kind: str) -> tuple[list[int], list[int], int]:
    """Tokens of the first nine tenths of a text, tokens of the rest, and the size of the vocabulary.

    >>> split_tokens(Text("a b\\na b c a\\na a\\nd a", ""), "words")
    ([1, 2, 3, 1, 2, 4, 1, 3, 1, 1, 3], [0, 1], 5)
    """
    if kind == "bytes":
        tokens = list(text.content.encode())
        end = len(tokens) * 9 // 10
        return tokens[:end], tokens[end:], 256
    words = text.content.replace("\n", f" {_END_OF_LINE} ").split()
    end = len(words) * 9 // 10
    counts = Counter(words[:end])
    counts.pop(_UNKNOWN, None)
    numbers = {word: number for number, word in enumerate([_UNKNOWN, *counts])}
    ids = [numbers.get(word, 0) for word in words]
    return ids[:end], ids[end:], len(numbers)


def train_arm(request: Json, send: Send) -> Json:
    """Train one arm in a process of its own; resume from its checkpoint if that belongs to the same run."""
    config = request["config"]
    torch.set_num_threads(config["threads"])
    training, validation = (torch.tensor(request[name]) for name in ("training", "validation"))
    model = new_model(config, request["vocabulary"])
    convert_model(model, request["convert"], config["backend"])
    plan = TrainingPlan.of_arm(request)
    result = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1),
        lambda step: [_loss(model, random_windows(training, config, config["seed"], step))],
        lambda: {"validation_loss": validation_loss(model, validation, config, _CURVE_WINDOWS)},
        plan,
        send,
    )
    with torch.no_grad():
        loss = validation_loss(model, validation, config)
    return result | {
        "setting": request["setting"],
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def new_model(config: Json, vocabulary: int) -> Any:
    """A GPT-2 of this size without dropout. Its random weights are the same for every arm."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config["seed"])
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=config["context"],
            n_embd=config["d_model"],
            n_layer=config["num_layers"],
            n_head=config["num_heads"],
            n_inner=config["d_ff"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def validation_loss(model: nn.Module, tokens: Tensor, config: Json, most_windows: int | None = None) -> float:
    """Mean loss in nats of every token but the first. Each token is predicted from those before it in its window.

    most_windows  number of windows, spread evenly over the text; None: all consecutive windows, the last one shorter
    """
    context = config["context"]
    starts = list(range(0, len(tokens) - 1, context))
    if most_windows is not None and len(starts) > most_windows:
        starts = starts[:: -(-len(starts) // most_windows)]
    windows = [tokens[start : start + context + 1] for start in starts]
    whole = [window for window in windows if len(window) == context + 1]
    batches = [torch.stack(whole[place : place + 32]) for place in range(0, len(whole), 32)]
    batches += [window[None] for window in windows if len(window) <= context]
    total = sum(_loss(model, batch).item() * (batch.numel() - len(batch)) for batch in batches)
    return total / sum(len(window) - 1 for window in windows)


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats, over all tokens but the first of each window."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
