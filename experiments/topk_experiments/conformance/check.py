"""One model: it is built, converted in every way, and each exercise is compared with what it must give."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from topk_attention import Completion, convert, unconvert
from topk_attention.convert import ConversionReport
from topk_attention.convert.search import attention_sites, feed_forward_sites
from topk_attention.convert.unknown_layers import unknown_layers

from ..runs.records import Json
from . import judges
from .catalogue import Model
from .comparisons import (
    ALL_KEYS,
    ALL_NEURONS,
    ATTENTION_K,
    COMPLETED,
    FEED_FORWARD_K,
    FEW_KEYS,
    FEW_NEURONS,
    LOADED,
    RESTORED,
    is_rounding,
)
from .exercises import FEW, GENERATED, OF_NUMBERS, OF_TRUTHS, Exercise, Results, exercises, find_inputs, forget
from .judges import (
    Difference,
    best_scores_in,
    dense_attention,
    dense_experts,
    dense_in_converted,
    dense_networks,
    difference,
)
from .report import OF_A_PART, WITHOUT_CLASS
from .tiny import nudged, tiny_model

# How often weights are moved by their last bits, to see whether rounding decides.
_NUDGES = 3
# Exercises that generate the same with two kinds of cache.
DYNAMIC, STATIC = "generation", "generation, static cache"

Outcome = Results | Exception
Outcomes = dict[str, Outcome]


def check_model(model: Model, *, generating: Mapping[str, Any] = GENERATED) -> Json:
    """What one model does.

    Returns for a record:

    family        of `catalogue.FAMILIES`
    parameters    their number
    inputs        name -> shape
    attention, feed_forward
                  how many layers were replaced, and reason -> how many were skipped; refused: an unexpected error
    differences   what is compared -> exercise -> the largest difference, or what is wrong in words
    not_judged    what is compared -> exercise -> why there is nothing to compare with
    built         false where there is no such tiny model or no input for it; `reason` says why

    generating  name -> options of the exercises that generate
    """
    about: Json = {"family": model.family}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # families warn of much that tiny configurations do
        judges.register()
        if not model.model_class:
            return {**about, "built": False, "reason": WITHOUT_CLASS}
        try:
            if model.is_of_a_part():
                return {**about, "built": False, "reason": OF_A_PART}
            built = tiny_model(model)
            _use_own_attention(built)
            given = find_inputs(built)
            check = _Check(built, exercises(built, given, generating=generating))
            if (why := check.changes()) is not None:
                return {**about, "built": False, "reason": why}
        except Exception as error:  # whatever a family raises at sizes or inputs that it does not take
            return {**about, "built": False, "reason": in_words(error)}
        record: Json = {
            **about,
            "built": True,
            "parameters": sum(one.numel() for one in built.parameters()),
            "inputs": given.shapes(),
        }
        return record | check.run()


class _Check:
    """The comparisons of one model.

    model      with its own attention
    exercises  by name
    """

    def __init__(self, model: Any, all_exercises: Mapping[str, Exercise]) -> None:
        self.model = model
        self.exercises = dict(all_exercises)
        self.few = {name: one for name, one in all_exercises.items() if name in FEW}
        self.differences: dict[str, dict[str, Difference]] = {}
        self.not_judged: dict[str, dict[str, str]] = {}
        self.own = self._all(self.exercises)

    def changes(self) -> str | None:
        """Why the model cannot be compared with itself; None where it can."""
        again, before = self._all({"plain": self.exercises["plain"]})["plain"], self.own["plain"]
        if isinstance(again, Exception):
            return in_words(again)
        if isinstance(before, Exception):
            return in_words(before)
        value = difference(again, before)
        return None if is_rounding("plain", value) else f"the original gives something else at each call ({value})"

    def run(self) -> Json:
        attention = self._attention()
        feed_forward = self._feed_forward()
        return {
            "attention": attention,
            "feed_forward": feed_forward,
            "differences": self.differences,
            "not_judged": {name: reasons for name, reasons in self.not_judged.items() if reasons},
        }

    def _attention(self) -> Json:
        try:
            report = convert(self.model, attention_k="all")
        except Exception as error:
            return self._refused("attention", error)
        if OF_NUMBERS in self.own:
            in_own_code = any(entry.kind == "attention" for entry in report.skipped)
            self.own[OF_TRUTHS] = _TRUTHS_ARE_ADDED if in_own_code else self.own[OF_NUMBERS]
        self._leave_out_wrong_static_cache()
        every_key = self._all(self.exercises)
        self._compare(ALL_KEYS, every_key, self.own)
        self._restore()
        self._leave_out_what_rounding_decides()
        self._leave_out_what_sdpa_gives(every_key)
        refused = self._few_keys([entry.path for entry in report.replaced], every_key)
        return _of_report(report, "attention") | ({"without_completion": refused} if refused else {})

    def _leave_out_wrong_static_cache(self) -> None:
        """Where the original itself generates something else with a static cache, it is no judge of that. GPT-Neo then
        cuts the wrong rows out of its window."""
        static, dynamic = self.own.get(STATIC), self.own.get(DYNAMIC)
        if static is None or dynamic is None or isinstance(static, Exception) or isinstance(dynamic, Exception):
            return
        value = difference(static, dynamic)
        if not is_rounding(STATIC, value):
            self.own[STATIC] = _NoJudgeError(f"the original gives something else than with its other caches ({value})")

    def _leave_out_what_sdpa_gives(self, found: Outcomes) -> None:
        """Where transformers' eager attention and its PyTorch attention contradict each other, either is right."""
        wrong = self._wrong()
        if not wrong:
            return
        try:
            self.model.set_attn_implementation("sdpa")
        except ValueError:
            return  # the family has eager attention alone
        by_sdpa = self._all(wrong)
        self.model.set_attn_implementation("eager")
        for name, right in by_sdpa.items():
            one = found[name]
            if isinstance(right, Exception):
                if type(one) is not type(right):
                    continue
                why = f"transformers' PyTorch attention fails as well: {in_words(right)}"
            else:
                if isinstance(one, Exception) or not is_rounding(name, difference(one, right)):
                    continue
                value = self.differences[ALL_KEYS][name]
                why = f"transformers' PyTorch attention, which this equals, is not its eager one ({value})"
            self._leave_out(name, why)

    def _leave_out_what_rounding_decides(self) -> None:
        """Where weights that differ in their last bits make the original give something else, it is no judge: beams of
        the same score, or two best tokens or experts that are as good."""
        for seed in range(_NUDGES if self._wrong() else 0):
            with nudged(self.model, seed):
                again = self._all(self._wrong())
            for name, one in again.items():
                right = self.own[name]
                if isinstance(right, Exception):
                    continue
                value = in_words(one) if isinstance(one, Exception) else difference(one, right)
                if not is_rounding(name, value):
                    why = "with weights that differ in the last bits the original gives something else"
                    self._leave_out(name, f"rounding decides: {why} ({value})")

    def _wrong(self) -> dict[str, Exercise]:
        """The exercises in which a model that keeps every key is not the original."""
        differences = self.differences[ALL_KEYS]
        return {name: self.exercises[name] for name, value in differences.items() if not is_rounding(name, value)}

    def _leave_out(self, name: str, why: str) -> None:
        """Take an exercise out of every comparison: the original is no judge of it."""
        self.not_judged.setdefault(ALL_KEYS, {})[name] = why
        del self.differences[ALL_KEYS][name]
        self.own[name] = _NoJudgeError(why)

    def _few_keys(self, layers: Sequence[str], every_key: Outcomes) -> str | None:
        """Keep few keys, then complete them: against dense attention where that is the model's own with all keys.

        Returns why the library does not complete this model's attention; None where it does.
        """
        by_interface, others, wrong = self._reached(layers)

        def dense(completed: bool, chosen: Mapping[str, Exercise]) -> Outcomes:
            if not by_interface:
                with best_scores_in(others, ATTENTION_K):
                    found = self._all(chosen)
                if OF_NUMBERS in found:  # a model's own code adds truth values to scores, as with every key
                    found[OF_TRUTHS] = found[OF_NUMBERS]
                return found
            with (
                dense_attention(self.model, ATTENTION_K, completed=completed, layers=by_interface),
                best_scores_in(others, ATTENTION_K),
            ):
                return self._all(chosen)

        expected = {**dense(False, self.exercises), **wrong}
        try:
            convert(self.model, attention_k=ATTENTION_K)
        except Exception as error:
            self.differences[FEW_KEYS] = {"conversion": in_words(error)}
            return None
        found = self._all(self.exercises)
        self._compare(FEW_KEYS, found, expected)
        self._acts(FEW_KEYS, found, every_key)
        self._save_and_load(found)
        self._restore()
        shorter = {
            name: one for name, one in self.exercises.items() if name in (*FEW, "in pieces, padded", "generation")
        }
        unjudged = {name: why for name, why in wrong.items() if name in shorter}
        expected = {} if others else {**dense(True, shorter), **unjudged}
        try:
            convert(self.model, attention_k=ATTENTION_K, completion=Completion())
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("completion for "):
                return str(error)
            self.differences[COMPLETED] = {"conversion": in_words(error)}
            return None
        if others:
            expected = {**self._completed_in_own_code(by_interface, shorter), **unjudged}
        self._compare(COMPLETED, self._all(shorter), expected)
        self._restore()
        return None

    def _completed_in_own_code(self, by_interface: Sequence[str], chosen: Mapping[str, Exercise]) -> Outcomes:
        """What the converted model gives where its layers hand queries, keys and values to dense attention."""
        with contextlib.ExitStack() as stack:
            if by_interface:
                stack.enter_context(dense_attention(self.model, ATTENTION_K, completed=True, layers=by_interface))
            reached = stack.enter_context(dense_in_converted(ATTENTION_K, completed=True))
            found = self._all(chosen)
        return found if reached else dict.fromkeys(found, _NoJudgeError("no layer in its own code was reached"))

    def _reached(self, layers: Sequence[str]) -> tuple[list[str], list[nn.Module], Outcomes]:
        """Layers that ask transformers' interface, the other layers, and exercises that have no judge.

        The judge is dense attention with all keys: where that is not the model's own, its few keys say nothing.
        """
        at = {path: self.model.get_submodule(path) for path in layers}
        used: set[int] = set()  # a class without an encoder has cross-attention that nothing calls
        hooks = [one.register_forward_pre_hook(lambda one, _: used.add(id(one))) for one in at.values()]
        try:
            with dense_attention(self.model, None):
                dense = self._all(self.exercises)
            reached = [path for path, one in at.items() if id(one) in judges.ATTENTION.called]
        except ValueError:  # transformers gives this model its own attention alone
            reached = []
            self._all({"plain": self.exercises["plain"]})
        finally:
            for hook in hooks:
                hook.remove()
        others = [one for path, one in at.items() if path not in reached and id(one) in used]
        wrong: Outcomes = {name: own for name, own in self.own.items() if isinstance(own, Exception)}
        if not reached:
            return [], others, wrong
        for name, own in self.own.items():
            if isinstance(own, Exception):
                continue
            one = dense[name]
            value = in_words(one) if isinstance(one, Exception) else difference(one, own)
            if not is_rounding(name, value):
                wrong[name] = _NoJudgeError(f"dense attention with all keys is not the model's own here ({value})")
        return reached, others, wrong

    def _feed_forward(self) -> Json:
        sites = {site.path: site for site in feed_forward_sites(self.model)}
        try:
            report = convert(self.model, feed_forward_k="all")
        except Exception as error:
            return self._refused("feed_forward", error)
        every_neuron = self._all(self.few)
        self._compare(ALL_NEURONS, every_neuron, self.own)
        self._restore()
        networks, experts = [], []
        for entry in report.replaced:
            first, last = sites[entry.path].linears_in, sites[entry.path].linear_out
            if len(first) > 0:
                networks.append((first, last))
            else:
                experts.append(self.model.get_submodule(entry.path))
        try:
            with dense_networks(networks, FEED_FORWARD_K), dense_experts(experts, FEED_FORWARD_K) as reached:
                expected = self._all(self.few)
            convert(self.model, feed_forward_k=FEED_FORWARD_K)
        except Exception as error:
            self.differences[FEW_NEURONS] = {"conversion": in_words(error)}
            return _of_report(report, "feed_forward")
        if len(reached) < len(experts):
            self.not_judged[FEW_NEURONS] = {"all": "no weight of the last product of experts has a known name"}
            expected = {}
        found = self._all(self.few)
        if expected:
            self._compare(FEW_NEURONS, found, expected)
        self._acts(FEW_NEURONS, found, every_neuron)
        self._restore()
        return _of_report(report, "feed_forward")

    def _refused(self, kind: str, error: Exception) -> Json:
        """What a record has of a refusal: why each layer of this kind was skipped, or another error."""
        if "replaced nothing" not in str(error):
            return {"replaced": 0, "skipped": {}, "refused": in_words(error)}
        attention, networks = list(attention_sites(self.model)), list(feed_forward_sites(self.model))
        known = attention if kind == "attention" else networks
        reasons = [str(site.obstacle) for site in known]
        paths = [*(site.path for site in attention), *(site.path for site in networks)]
        reasons += [entry.reason for entry in unknown_layers(self.model, paths) if entry.kind == kind]
        return {"replaced": 0, "skipped": dict(Counter(reasons))}

    def _save_and_load(self, expected: Outcomes) -> None:
        """A saved model, loaded and converted without any k, gives what the saved one gave."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.model.save_pretrained(folder)
                loaded = type(self.model).from_pretrained(folder)
                _use_own_attention(loaded)
                convert(loaded.float().eval())
                found = self._all({"plain": self.exercises["plain"]}, loaded)
            except Exception as error:
                found = {"plain": error}
        self._compare(LOADED, found, expected)

    def _restore(self) -> None:
        """`unconvert`; the first time its outputs are compared, to the last bit."""
        unconvert(self.model)
        if RESTORED not in self.differences:
            self._compare(RESTORED, self._all({"plain": self.exercises["plain"]}), self.own)

    def _acts(self, what: str, few: Outcomes, every: Outcomes) -> None:
        """Where few give what all give in every exercise, nothing was left out, and comparisons say nothing."""
        pairs = [(one, every[name]) for name, one in few.items()]
        if not any(
            isinstance(one, Exception) or isinstance(right, Exception) or difference(one, right) != 0
            for one, right in pairs
        ):
            self.not_judged.setdefault(what, {})["all"] = "no input that was tried reaches the layers"

    def _all(self, chosen: Mapping[str, Exercise], model: Any = None) -> Outcomes:
        model = self.model if model is None else model
        outcomes: Outcomes = {}
        for name, exercise in chosen.items():
            forget(model)
            try:
                outcomes[name] = exercise(model)
            except Exception as error:
                outcomes[name] = error
        return outcomes

    def _compare(self, what: str, found: Outcomes, expected: Outcomes) -> None:
        differences: dict[str, Difference] = {}
        for name, outcome in found.items():
            right = expected[name]
            if isinstance(right, Exception):
                where = self.not_judged.setdefault(what, {})
                where[name] = str(right) if isinstance(right, _NoJudgeError) else f"the original: {in_words(right)}"
            elif isinstance(outcome, Exception):
                differences[name] = in_words(outcome)
            else:
                differences[name] = difference(outcome, right)
        self.differences[what] = differences


class _NoJudgeError(Exception):
    """There is nothing to compare an exercise with."""


_TRUTHS_ARE_ADDED = _NoJudgeError("layers left on their own attention add truth values as if they were numbers")


def _use_own_attention(model: Any) -> None:
    """Eager attention, and eager experts, where the model has them."""
    model.set_experts_implementation("eager")
    with contextlib.suppress(ValueError):  # a family with one form of attention keeps it
        model.set_attn_implementation("eager")


def _of_report(report: ConversionReport, kind: str) -> Json:
    skipped = Counter(entry.reason for entry in report.skipped if entry.kind == kind)
    return {"replaced": sum(entry.kind == kind for entry in report.replaced), "skipped": dict(skipped)}


def in_words(error: BaseException) -> str:
    """An error in a line, with the last places of the code that raised it."""
    first = " ".join(str(error).split())[:400]
    places = [
        f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if f"torch{os.sep}nn" not in frame.filename and Path(__file__).parent != Path(frame.filename).parent
    ]
    return f"{type(error).__name__}: {first}" + (f" ({', '.join(places[-2:])})" if places else "")
