"""Fine-tuning and training from scratch: one model trained in full and with several k on the same questions.

Every arm starts from the same weights and sees the same questions in the same order. It runs in a process of its own
and writes a checkpoint whenever it evaluates. Its record is appended when it has finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from topk_attention.backends import choose_backend
from topk_attention.environment import now

from ..models.pretrained import ModelSource, find_model, load_config, load_model, load_tokenizer
from ..models.settings import Setting, convert_model
from ..runs.checks import check_above_0, check_at_least
from ..runs.ledger import Ledger, made_when, what_differs
from ..runs.ledger import identity as identity_of
from ..runs.process import Send
from ..runs.progress import line_printer
from ..runs.records import Json, read_json, write_json
from ..runs.training import TrainingPlan, seed_of, train, train_in_fresh_process
from .evaluation import DEFAULT_OUT
from .points import configuration, in_words, key_of, packed
from .readers import READERS, Reader, TrainingExamples, reader_name, scores
from .tasks import Question, QuestionSet, read_questions
from .tasks.questions import split_by_passage

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/qa-finetuning/1"
RECORDS = "finetuning.jsonl"
# File in the folder of a saved model that names its training.
_TRAINING = "training.json"
_POSITION_BIAS = "relative_attention_bias"


@dataclass(frozen=True)
class FinetuningConfig:
    """What is trained and how; paths and names as the user wrote them.

    training            file, folder or id of questions to train on
    dataset             questions to evaluate on; None: a part of the training set
    hold_out            that part, as a share of the passages; they are then not trained on
    from_scratch        begin with random weights of the model's configuration
    batch               questions of a step
    parts               number of parts of like length that a batch is cut into, for less memory and padding
    position_bias_rate  learning rate of T5's tables of relative position biases, as a multiple of that of the rest
    beta2               of AdamW: how long it remembers squared gradients
    evaluate_every      steps between two points of the curve
    curve_questions     number of questions that a point of the curve is measured on
    save                folder for the trained models, one folder an arm; None: they are not kept
    """

    model: str
    training: str
    dataset: str | None = None
    hold_out: float = 0.2
    settings: Sequence[Setting] = (Setting(),)
    from_scratch: bool = False
    steps: int = 1000
    batch: int = 16
    parts: int = 1
    learning_rate: float = 5e-5
    warm_up_steps: int = 40
    falls: bool = True
    position_bias_rate: float = 1.0
    beta2: float = 0.999
    evaluate_every: int = 200
    curve_questions: int = 100
    save: Path | None = None
    seed: int = 0
    out: Path = DEFAULT_OUT
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "batch", "parts", "evaluate_every", "curve_questions", "threads")
        if self.batch < self.parts:
            raise ValueError(f"parts must be at most the batch of {self.batch}, got {self.parts}")
        check_above_0(self, "learning_rate", "position_bias_rate")
        if not 0 < self.hold_out < 1:
            raise ValueError(f"hold_out must be between 0 and 1, got {self.hold_out}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be at least 0 and below 1, got {self.beta2}")
        if not self.settings:
            raise ValueError("there is nothing to train: give at least one of settings")
        choose_backend(self.backend)

    def describe_training(self) -> Json:
        """For the record."""
        names = ("from_scratch", "steps", "batch", "learning_rate", "warm_up_steps", "falls", "seed")
        # Recorded only if they are not the usual ones: records from before they could be chosen stay the same.
        unusual = {"position_bias_rate": 1.0, "beta2": 0.999}
        chosen = {name: getattr(self, name) for name, usual in unusual.items() if getattr(self, name) != usual}
        return {name: getattr(self, name) for name in names} | chosen


def run_finetuning(config: FinetuningConfig, console: Console) -> list[Json]:
    """Train every arm that is not on file yet, append it to `finetuning.jsonl`, and return the arms asked for.

    Raises:
        ValueError: the model, a set or a k does not fit, or a folder holds another model; the message says how.
        FileNotFoundError: there is no such file.
        WorkerError: an arm failed. The arms before it and its last checkpoint are kept.
    """
    say = line_printer(console)
    source = find_model(config.model, say)
    name = reader_name(load_config(source), is_trained=False)
    if READERS[name].training is None:
        raise ValueError(f"{source.name} is a decoder model: fine-tuning is for text-to-text and span models")
    training = read_questions(config.training)
    evaluation = None if config.dataset is None else read_questions(config.dataset)
    if evaluation is None:
        training, evaluation = split_by_passage(training, config.hold_out, config.seed)
    ledger = Ledger(config.out / RECORDS, schema=SCHEMA, folder=Path(__file__).parent, fresh=config.fresh)
    records = []
    arms = [
        _new_record(config, source, name, training, evaluation, setting, ledger.here) for setting in config.settings
    ]
    folders = [_folder(config, source, setting) for setting in config.settings]
    _check_folders(folders, arms, ledger)
    for number, (setting, wanted, folder) in enumerate(zip(config.settings, arms, folders, strict=True), 1):
        label = f"[{number}/{len(config.settings)}] {evaluation.name}, {setting}"
        record = ledger.find(configuration(wanted))
        if record is None or (folder is not None and not folder.exists()):
            if note := ledger.why_not(configuration(wanted)):
                say(f"{label}: {note}")
            record = wanted | _train(config, source, setting, wanted, training, evaluation, console, label)
            ledger.append(record)
            _checkpoint(config, wanted).unlink(missing_ok=True)
            say(f"{label}: {in_words(record)}")
        else:
            say(f"{label}: {in_words(record)} ({made_when(record)})")
        records.append(record)
    say(f"Records: {config.out / RECORDS}")
    if config.save is not None:
        say(f"Models:  {config.save}")
    return records


def train_arm(request: Json, send: Send) -> Json:
    """Train one arm in a process of its own; resume from its checkpoint if that belongs to the same run."""
    torch.set_num_threads(request["threads"])
    reader = READERS[request["reader"]]
    assert reader.training is not None
    plan = TrainingPlan(**request["plan"] | {"checkpoint": Path(request["plan"]["checkpoint"])})
    source = ModelSource(**request["model"])
    torch.manual_seed(plan.seed)  # weights that the file lacks
    model = _new_model(source, reader) if request["from_scratch"] else load_model(source, reader.auto_class)
    tokenizer = load_tokenizer(source)
    convert_model(model, request["convert"], request["backend"])
    training, evaluation = (list(map(Question.from_json, request[name])) for name in ("training", "evaluation"))
    result = train(
        model,
        _new_optimizer(model, plan.learning_rate, request),
        Batches(reader.training(model, tokenizer, training), request["batch"], request["parts"], plan.seed),
        lambda: _point(reader, model, tokenizer, evaluation[: request["curve_questions"]]),
        plan,
        send,
    )
    outcomes = _outcomes(reader, model, tokenizer, evaluation)
    if request["save"] is not None:
        _save(model, tokenizer, Path(request["save"]), request["key"])
    return result | {
        "scores": scores(outcomes),
        "outcomes": {name: packed(values) for name, values in outcomes.items()},
        "lengths": reader.lengths(tokenizer, evaluation, [], 0).describe(request["attention_k"]),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


class Batches:
    """step -> losses of the parts of its batch. The seed shuffles every epoch, so any step can be made at any time.

    batch  examples of a step
    parts  number of parts that a batch is cut into, by length, for little padding
    """

    def __init__(self, examples: TrainingExamples, batch: int, parts: int, seed: int) -> None:
        self._examples, self._batch, self._parts, self._seed = examples, batch, parts, seed
        self._epoch, self._order = -1, list(range(len(examples.lengths)))

    def __call__(self, step: int) -> Any:
        numbers = sorted(self.numbers(step), key=lambda number: self._examples.lengths[number])
        whole = self._weight(numbers)
        for part in range(self._parts):
            chosen = numbers[part * len(numbers) // self._parts : (part + 1) * len(numbers) // self._parts]
            yield self._examples.loss(chosen) * (self._weight(chosen) / whole)

    def _weight(self, numbers: Sequence[int]) -> int:
        return sum(self._examples.weights[number] for number in numbers)

    def numbers(self, step: int) -> list[int]:
        """The examples of a step, counted from 1."""
        return [self._at(place) for place in range((step - 1) * self._batch, step * self._batch)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, len(self._order))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self._order), generator=generator).tolist()
        return self._order[within]


def _new_model(source: ModelSource, reader: Reader) -> Any:
    """The model with random weights."""
    import transformers

    return getattr(transformers, reader.auto_class).from_config(load_config(source), dtype=torch.float32)


def _new_optimizer(model: Any, learning_rate: float, request: Json) -> torch.optim.Optimizer:
    """AdamW. T5's position biases have a parameter group of their own if they learn at another rate."""
    rate = request["position_bias_rate"]
    groups: list[Json] = [{"params": list(model.parameters())}]
    if rate != 1.0:
        named = list(model.named_parameters())
        biases = [parameter for name, parameter in named if _POSITION_BIAS in name]
        if not biases:
            raise ValueError("position_bias_rate is for models with relative position biases, as T5 has them")
        others = [parameter for name, parameter in named if _POSITION_BIAS not in name]
        groups = [{"params": others}, {"params": biases, "rate": rate}]
    betas = (0.9, request["beta2"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=request["weight_decay"])


def _outcomes(reader: Reader, model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, list[float]]:
    answers: dict[int, Any] = {}
    for batch in reader.answers(model, tokenizer, dict(enumerate(questions)), [], 0):
        answers |= batch
    return reader.outcomes(questions, [answers[number] for number in range(len(questions))])


def _point(reader: Reader, model: Any, tokenizer: Any, questions: Sequence[Question]) -> Json:
    outcomes = _outcomes(reader, model, tokenizer, questions)
    return {name: 100 * sum(values) / len(values) for name, values in outcomes.items()}


def _check_folders(folders: Sequence[Path | None], arms: Sequence[Json], ledger: Ledger) -> None:
    """Raise before anything is trained if an arm's model would replace another's."""
    taken: set[Path] = set()
    for folder, arm in zip(folders, arms, strict=True):
        if folder is None:
            continue
        if folder in taken:
            raise ValueError(f"two arms would be saved in {folder}; train them in two runs, each with its own --save")
        taken.add(folder)
        if folder.exists() and not _is_of(folder, arm, ledger):
            raise ValueError(f"{folder} holds the model of another training; give another --save or move it away")


def _is_of(folder: Path, arm: Json, ledger: Ledger) -> bool:
    """Whether a saved model is this arm's. The oldest folders hold no key: for them a record on file decides."""
    try:
        training = read_json(folder / _TRAINING)
    except ValueError:
        return False
    if training is not None:
        return bool(training.get("key") == key_of(arm))
    return any(not what_differs(record, configuration(arm), ledger.here) for record in ledger.records)


def _save(model: Any, tokenizer: Any, folder: Path, key: str) -> None:
    """Write the model, its tokenizer and the key of its training; the folder appears only when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_json(partial / _TRAINING, {"key": key})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _new_record(
    config: FinetuningConfig,
    source: ModelSource,
    reader: str,
    training: QuestionSet,
    evaluation: QuestionSet,
    setting: Setting,
    here: Json,
) -> Json:
    return {
        "schema": SCHEMA,
        "model": {"name": source.name, "revision": source.revision},
        "training": config.describe_training() | {"questions": training.describe()},
        "questions": evaluation.describe(),
        "protocol": READERS[reader].protocol | {"reader": reader},
        "setting": setting.describe(),
        "run": {
            "backend": choose_backend(config.backend).name,
            "threads": config.threads or torch.get_num_threads(),
            "dtype": "float32",
            "parts": config.parts,
            "evaluate_every": config.evaluate_every,
            "curve_questions": config.curve_questions,
        },
        "environment": here,
    }


def _train(
    config: FinetuningConfig,
    source: ModelSource,
    setting: Setting,
    record: Json,
    training: QuestionSet,
    evaluation: QuestionSet,
    console: Console,
    label: str,
) -> Json:
    checkpoint = _checkpoint(config, record)
    if config.fresh:
        checkpoint.unlink(missing_ok=True)
    folder = _folder(config, source, setting)
    request = {
        "reader": record["protocol"]["reader"],
        "model": vars(source),
        "from_scratch": config.from_scratch,
        "convert": setting.for_convert(),
        "attention_k": record["setting"]["attention_k"],
        "training": [asdict(question) for question in training.questions],
        "evaluation": [asdict(question) for question in evaluation.shuffled(config.seed)],
        "batch": config.batch,
        "parts": config.parts,
        "weight_decay": 0.0,
        "position_bias_rate": config.position_bias_rate,
        "beta2": config.beta2,
        "curve_questions": config.curve_questions,
        "save": None if folder is None else str(folder),
        "key": key_of(record),
        "threads": record["run"]["threads"],
        "backend": record["run"]["backend"],
        "plan": {
            "steps": config.steps,
            "learning_rate": config.learning_rate,
            "evaluate_every": config.evaluate_every,
            "checkpoint": str(checkpoint),
            "identity": identity_of(configuration(record), record["environment"]),
            "seed": config.seed,
            "warm_up_steps": config.warm_up_steps,
            "falls": config.falls,
        },
    }
    result = train_in_fresh_process(f"{__name__}:train_arm", request, label, config.steps, console)
    return result | {"environment": record["environment"] | {"date": now()}}


def _checkpoint(config: FinetuningConfig, record: Json) -> Path:
    return config.out / "work" / f"{key_of(record)}.pt"


def _folder(config: FinetuningConfig, source: ModelSource, setting: Setting) -> Path | None:
    """The folder of an arm's model: MODEL-full, MODEL-attention-k-64 and so on."""
    if config.save is None:
        return None
    arm = str(setting).replace(",", "").replace(" = ", "-").replace(" ", "-")
    return config.save / f"{source.name.rpartition('/')[2]}-{arm}"
