"""A passkey is hidden at some depth of a long text: does a model with few keys per query still find it?

Each setting has a process of its own, which reads the text before the passkey once and goes on from there for each
depth. Every answer is written down when it is there; an interrupted run continues with those that are missing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from topk_attention.backends import choose_backend

from ..models.generation import new_cache, plain_ids, read, user_turn
from ..models.pretrained import (
    ModelSource,
    find_model,
    load_config,
    load_model_to_run,
    load_tokenizer,
    longest_input,
    unpacked,
)
from ..models.settings import Setting, convert_model, one_at_a_time
from ..models.text import Text, first_tokens, read_text
from ..runs.checks import check_at_least, check_ks, check_one_of
from ..runs.ledger import Ledger, is_finished, made_when
from ..runs.process import Send, failures_named, run_in_fresh_process
from ..runs.progress import Say, line_printer
from ..runs.records import Json
from ..runs.timing import Stopwatch
from ..show.console import print_table
from .passkey_report import NAME, SCHEMA, report, table_rows

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_OUT = Path("results/passkey")
# Filler -> the sentences of the passkey in it.
FILLERS = {
    "text": "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n",
    "sentences": " The pass key is {key}. Remember it. {key} is the pass key.",
}
FRAMES = ("chat", "plain")
_DIGITS = 5
_SENTENCES = " The rain falls on the roof. The cat sleeps by the stove. The kettle sings and nobody is in a hurry."
_TASK = "There is a pass key hidden in the following text. Find it and remember it.\n\n"
_QUESTION = "\n\nWhat is the pass key?"
_ANSWER = "The pass key is"


@dataclass(frozen=True)
class PasskeyConfig:
    """What is hidden where; paths and the model as the user wrote them.

    k, completed_k  keys per query, of top-k attention alone and completed
    depths          places of the passkey, evenly from the beginning of the text on
    filler          "sentences": three of them again and again, or "text"
    frame           "chat", the model's template if it has one, or "plain"

    >>> PasskeyConfig(depths=0)
    Traceback (most recent call last):
    ValueError: depths must be at least 1, got 0
    """

    model: str | None = None
    text: Path | None = None
    num_tokens: int = 7500
    k: Sequence[int] = (64, 32)
    completed_k: Sequence[int] = (32,)
    depths: int = 10
    filler: str = "sentences"
    frame: str = "chat"
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_ks("k", self.k)
        check_ks("completed-k", self.completed_k)
        check_at_least(1, self, "depths", "threads", "num_tokens")
        check_one_of(list(FILLERS), self, "filler")
        check_one_of(FRAMES, self, "frame")
        if self.filler == "sentences" and self.text is not None:
            raise ValueError(
                f'text is for filler "text", which stands around the passkey, got {self.text} with filler "sentences"'
            )
        choose_backend(self.backend)

    @property
    def settings(self) -> list[Setting]:
        return one_at_a_time(self.k, completed_k=self.completed_k)

    def passkey(self, depth: int) -> str:
        """The digits hidden at a depth."""
        return f"{random.Random(f'{self.seed} {depth}').randrange(10 ** (_DIGITS - 1), 10**_DIGITS)}"


@dataclass(frozen=True)
class Prompt:
    """Token ids of a text with its passkey, in parts.

    before  up to the passkey, a beginning of every deeper prompt's
    after   from the passkey to the beginning of the answer
    answer  the digits of the passkey
    """

    before: list[int]
    after: list[int]
    answer: list[int]


def run_passkey(config: PasskeyConfig, console: Console) -> list[Json]:
    """Ask for every passkey that is not on file, write the table, and return the records in its order.

    Raises:
        ValueError: the model, the text or a k does not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a setting failed. The answers before are kept.
    """
    say = line_printer(console)
    text = _filling_text(config)
    source = find_model(config.model, say)
    loadable = unpacked(source, config.out / "work" / "model", say)
    prompts = prompts_of(config, loadable, text)
    folder = Path(__file__).parent
    ledger = Ledger(config.out / f"{NAME}.jsonl", schema=SCHEMA, folder=folder, fresh=config.fresh)
    records = []
    for setting in config.settings:
        points = {depth: _point(config, setting, depth, source, text) for depth in range(config.depths)}
        on_file = {depth: ledger.find({"point": point}, spares=is_finished) for depth, point in points.items()}
        missing = [depth for depth, record in on_file.items() if record is None]
        found = {depth: record for depth, record in on_file.items() if record is not None}
        if missing:
            request = {
                "model": vars(loadable),
                "convert": setting.for_convert(),
                "prompts": {str(depth): vars(prompts[depth]) for depth in missing},
                "threads": config.threads or torch.get_num_threads(),
                "seed": config.seed,
                "backend": choose_backend(config.backend).name,
            }

            of_setting = _Answers(str(setting), points, found, ledger, say)
            with console.status(f"{setting}: {len(missing)} depths to go ..."), failures_named(str(setting)):
                run_in_fresh_process(f"{__name__}:ask", request, on_message=of_setting.write)
        else:
            say(f"{setting}: {made_when(found[0])}")
        records += [found[depth] for depth in range(config.depths)]
    headings, *rows = table_rows(records)
    print_table(console, f"{source.name}, a passkey in {config.num_tokens:,} tokens", headings, rows)
    for path in (ledger.path, *report(config.out)):
        say(f"Written: {path}")
    return records


@dataclass(frozen=True)
class _Answers:
    """Of one setting, as they come: depth -> point, and depth -> record."""

    name: str
    points: dict[int, Json]
    found: dict[int, Json]
    ledger: Ledger
    say: Say

    def write(self, message: Json) -> None:
        depth = message.pop("depth")
        record = self.ledger.new_record({"point": self.points[depth]}) | {"outcome": "finished"} | message
        self.ledger.append(record)
        self.found[depth] = record
        outcome = "found" if record["found"] else "not found"
        where = f"depth {depth / len(self.points):.0%}"
        mean = sum(record["log_probabilities"]) / len(record["log_probabilities"])
        self.say(f"{self.name}, {where}: {outcome} (log-probability {mean:.2f} a digit), {record['elapsed_s']:.1f} s")


def ask(request: Json, send: Send) -> Json:
    """Let a model in one setting read each prompt; sends, for each depth, whether it finds the passkey.

    It finds it if each digit is the most likely token after the right ones before it. `ranks` has how many tokens are
    likelier than each digit, and `log_probabilities` the natural logarithm of its probability.
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model_to_run(ModelSource(**request["model"]))
    convert_model(model, request["convert"], request["backend"])
    cache = new_cache("topk" if request["convert"]["attention_k"] is not None else "dynamic", model, 0)
    num_read = 0
    prompts = {int(depth): Prompt(**prompt) for depth, prompt in request["prompts"].items()}
    for depth, prompt in sorted(prompts.items()):
        with Stopwatch() as stopwatch:
            if len(prompt.before) > num_read:
                read(model, prompt.before[num_read:], cache)
                num_read = len(prompt.before)
            answer = _answer(model, cache, prompt)
            cache.crop(num_read - cache.get_seq_length())
        send({"depth": depth, "elapsed_s": stopwatch.elapsed_s} | answer)
    return {}


@torch.no_grad()
def _answer(model: Any, cache: Any, prompt: Prompt) -> Json:
    """What the model says of each digit of the passkey after the rest of the prompt and the digits before."""
    first = read(model, prompt.after, cache)
    logits = [first[None]]
    if len(prompt.answer) > 1:
        ids = torch.tensor([prompt.answer[:-1]])
        logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float())
    chances = torch.cat(logits).log_softmax(-1)
    of_digits = chances.gather(1, torch.tensor(prompt.answer)[:, None])
    ranks = (chances > of_digits).sum(1).tolist()
    return {"found": not any(ranks), "ranks": ranks, "log_probabilities": of_digits[:, 0].tolist()}


def _filling_text(config: PasskeyConfig) -> Text:
    """What stands around the passkey, or what is repeated there."""
    return Text(_SENTENCES, "three sentences, repeated") if config.filler == "sentences" else read_text(config.text)


def prompts_of(config: PasskeyConfig, source: ModelSource, text: Text) -> list[Prompt]:
    """The prompt of each depth, all of the same number of tokens and the same text around the passkey.

    Raises:
        ValueError: the text is too short, the prompt too short for the question, or the model takes shorter inputs.
    """
    tokenizer = load_tokenizer(source)

    def ids(content: str) -> list[int]:
        return plain_ids(tokenizer, content)

    framed_before, framed_after = user_turn(tokenizer, _TASK, _QUESTION)
    if config.frame == "plain":
        framed_before, framed_after = _TASK, f"{_QUESTION} "
    before, after = ids(framed_before), ids(framed_after + _ANSWER)
    needle_of = FILLERS[config.filler]
    keys = [config.passkey(depth) for depth in range(config.depths)]
    parts = [(ids(needle_of.format(key=key)), _space_and_digits(tokenizer, key)) for key in keys]
    around = len(before) + len(after) + max(len(needle) + sum(map(len, answer)) for needle, answer in parts)
    room = config.num_tokens - around
    if room < config.depths:
        raise ValueError(
            f"tokens must be at least {around + config.depths}, for the question and a text around the passkey, got "
            f"{config.num_tokens}"
        )
    limit = longest_input(load_config(source))
    if limit is not None and config.num_tokens > limit:
        raise ValueError(f"tokens must be at most {limit}, the longest input of {source.name}, got {config.num_tokens}")
    if config.filler == "sentences":
        sentences = ids(text.content)
        filler, unit = (sentences * (room // len(sentences) + 1))[:room], len(sentences)
    else:
        filler, unit = first_tokens(text, tokenizer, room)[0].tolist(), 1
    prompts = []
    for depth, (needle, (space, digits)) in enumerate(parts):
        place = depth * room // config.depths // unit * unit
        prompts.append(Prompt(before + filler[:place], needle + filler[place:] + after + space, digits))
    return prompts


def _space_and_digits(tokenizer: Any, key: str) -> tuple[list[int], list[int]]:
    """The tokens of a space, where it has some of its own, and those of the digits after it."""
    tokens = plain_ids(tokenizer, f" {key}")
    num_spaces = next((i for i, token in enumerate(tokens) if tokenizer.decode([token]).strip()), 0)
    return tokens[:num_spaces], tokens[num_spaces:]


def _point(config: PasskeyConfig, setting: Setting, depth: int, source: ModelSource, text: Text) -> Json:
    return {
        "setting": setting.describe(),
        "depth": depth,
        "depths": config.depths,
        "num_tokens": config.num_tokens,
        "filler": config.filler,
        "frame": config.frame,
        "passkey": config.passkey(depth),
        "model": [source.name, source.revision],
        "text": [text.source, text.sha256],
        "threads": config.threads or torch.get_num_threads(),
        "backend": None if setting.is_full else choose_backend(config.backend).name,
    }
