"""Loss curves of one small language model, trained with dense and with top-k feed-forward layers.

All arms have the same initial weights, batches and schedule: only the feed-forward layers differ. Tokens are the bytes
of a text; its last tenth is the validation set. Each arm runs in a process of its own and writes a checkpoint whenever
it evaluates. The record is written after each arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_count
from topk_attention.nn import TopKFeedForward

from ..models.text import read_text
from ..runs.ledger import experiment_environment
from ..runs.process import Send
from ..runs.records import Json
from ..runs.training import TrainingPlan, check_model_and_training, name_of_arm, random_windows, train, train_arms
from .report import report

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/feed-forward-curve/1"
DEFAULT_OUT = Path("results/feed-forward-curve")
_VOCABULARY = 256
_VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class CurveConfig:
    """What is trained and how.

    k               neurons kept per token; one arm each, beside the dense arm
    context         bytes of a window
    evaluate_every  steps between two points of a curve; a checkpoint is written at each
    """

    k: Sequence[int] = (128,)
    text: Path | None = None
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    d_ff: int = 1024
    context: int = 256
    batch: int = 16
    steps: int = 400
    learning_rate: float = 1e-3
    evaluate_every: int = 20
    threads: int = 2
    seed: int = 0
    backend: str = "auto"
    out: Path = DEFAULT_OUT
    fresh: bool = False

    def __post_init__(self) -> None:
        for k in self.k:
            check_count("k", k)
        check_model_and_training(self)
        choose_backend(self.backend)

    def as_record(self) -> Json:
        """The fields a record keeps: no files, and the backend that really runs."""
        record = {name: value for name, value in asdict(self).items() if name not in ("text", "out", "fresh")}
        return record | {"k": list(self.k), "backend": choose_backend(self.backend).name}


def run_feed_forward_curve(config: CurveConfig, console: Console) -> Json:
    """Train every arm that is not on file yet, draw the curves, and return the record.

    Raises:
        ValueError: the text is too short.
        WorkerError: an arm failed. Finished arms and its last checkpoint are kept.
    """
    text = read_text(config.text)
    tokens = list(text.content.encode())
    if len(tokens) < 20 * (config.context + 1):
        raise ValueError(
            f"{text.source} is too short: at least {20 * (config.context + 1):,} bytes needed, it has {len(tokens):,}"
        )
    path = config.out / "feed-forward-curve.json"
    new = {
        "schema": SCHEMA,
        "config": config.as_record(),
        "text": {"source": text.source, "sha256": text.sha256, "num_bytes": len(tokens)},
        "environment": experiment_environment(Path(__file__).parent),
    }
    requests = {name_of_arm({"k": k}): {"config": new["config"], "k": k, "tokens": tokens} for k in (None, *config.k)}
    record = train_arms(path, new, requests, f"{__name__}:train_arm", config.steps, console, config.fresh)
    report(record, path, console)
    return record


class Block(nn.Module):
    """One transformer layer with layer normalisation before attention and before the feed-forward part."""

    def __init__(self, config: Json, k: int | None) -> None:
        super().__init__()
        d_model, d_ff = config["d_model"], config["d_ff"]
        self.num_heads = config["num_heads"]
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.to_qkv, self.to_output = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        linear_in, linear_out = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.feed_forward: nn.Module = (
            nn.Sequential(linear_in, nn.GELU(), linear_out)
            if k is None
            else TopKFeedForward(linear_in, linear_out, k=k, activation="gelu", backend=config["backend"])
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()  # [B, H, L, D]
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.to_output(heads.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nn.Module):
    """Bytes [B, L] -> logits [B, L, 256], with learned positions. Equal seeds give all arms equal weights."""

    def __init__(self, config: Json, k: int | None) -> None:
        super().__init__()
        torch.manual_seed(config["seed"])
        self.tokens = nn.Embedding(_VOCABULARY, config["d_model"])
        self.positions = nn.Parameter(0.02 * torch.randn(config["context"], config["d_model"]))
        self.blocks = nn.Sequential(*(Block(config, k) for _ in range(config["num_layers"])))
        self.norm = nn.LayerNorm(config["d_model"])
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def train_arm(request: Json, send: Send) -> Json:
    """Train one arm in a process of its own; resume from its checkpoint if that belongs to the same run."""
    config = request["config"]
    torch.set_num_threads(config["threads"])
    tokens = torch.tensor(request["tokens"], dtype=torch.uint8)
    num_training = len(tokens) * 9 // 10
    training, validation = tokens[:num_training], tokens[num_training:]
    model = LanguageModel(config, request["k"])
    plan = TrainingPlan.of_arm(request)
    result = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1),
        lambda step: [_loss(model, random_windows(training, config, config["seed"], step))],
        lambda: {"validation_loss": _validation_loss(model, validation, config)},
        plan,
        send,
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"k": request["k"], "num_parameters": num_parameters} | result


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of a batch, nats per byte."""
    windows = windows.long()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def _validation_loss(model: nn.Module, tokens: Tensor, config: Json) -> float:
    batches = (random_windows(tokens, config, 0, number) for number in range(_VALIDATION_BATCHES))
    return sum(_loss(model, batch).item() for batch in batches) / _VALIDATION_BATCHES
