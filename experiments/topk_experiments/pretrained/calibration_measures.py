"""By what a calibrated model is judged: perplexity, or for encoders how far its sentence embeddings move."""

from __future__ import annotations

from typing import Protocol

from ..runs.records import Json


class Measure(Protocol):
    """One number of a run, smaller is better, and the words for it."""

    field: str  # the run's
    name: str
    axis: str
    over_heading: str  # of a column that compares with full attention
    same: float  # values whose ratio differs from 1 by less are the same

    def is_close(self, run: Json, full: Json) -> bool: ...
    def closeness(self, full: Json) -> str: ...
    def number(self, run: Json) -> str: ...
    def over_full(self, run: Json, full: Json) -> str: ...
    def short(self, run: Json, full: Json) -> str: ...
    def against(self, run: Json, full: Json) -> str: ...


class Perplexity:
    """Judged beside full attention's."""

    field = "perplexity"
    name = "perplexity"
    axis = "perplexity (lower is better)"
    over_heading = "over full"
    same = 0.002
    close = 0.03

    def is_close(self, run: Json, full: Json) -> bool:
        return run[self.field] <= (1 + self.close) * full[self.field]

    def closeness(self, full: Json) -> str:
        return f"within {100 * self.close:.0f} % of full attention's {full[self.field]:.2f}"

    def number(self, run: Json) -> str:
        return f"{run[self.field]:.2f}"

    def over_full(self, run: Json, full: Json) -> str:
        return f"{100 * (run[self.field] / full[self.field] - 1):+.1f} %"

    def short(self, run: Json, full: Json) -> str:
        return f"{self.number(run)} ({self.over_full(run, full)})"

    def against(self, run: Json, full: Json) -> str:
        return f"{self.number(run)} against {full[self.field]:.2f} in full ({self.over_full(run, full)})"


class EmbeddingError:
    """Mean distance of unit vectors from full attention's: zero in full."""

    field = "embedding_error"
    name = "embedding error"
    axis = "distance of embeddings from full attention's"
    over_heading = "cosine to full"
    same = 0.02
    close = 0.05

    def is_close(self, run: Json, full: Json) -> bool:
        return run[self.field] <= self.close

    def closeness(self, full: Json) -> str:
        return f"within {100 * self.close:.0f} % of full attention's embeddings"

    def number(self, run: Json) -> str:
        return f"{100 * run[self.field]:.1f} %"

    def over_full(self, run: Json, full: Json) -> str:
        return f"{run['cosine']:.4f}"

    def short(self, run: Json, full: Json) -> str:
        return self.number(run)

    def against(self, run: Json, full: Json) -> str:
        return f"{self.number(run)} (cosine {self.over_full(run, full)} to full attention's)"


_MEASURES: dict[str, Measure] = {measure.field: measure for measure in (Perplexity(), EmbeddingError())}


def measure_of(record: Json) -> Measure:
    return _MEASURES[record.get("measure", "perplexity")]
