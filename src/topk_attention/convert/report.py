"""What a conversion did to each layer, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from .settings import K


@dataclass(frozen=True)
class ReportEntry:
    path: str  # as in model.named_modules()
    kind: Literal["attention", "feed_forward"]
    k: K | None  # None where skipped
    reason: str

    @property
    def replaced(self) -> bool:
        return self.k is not None


@dataclass(frozen=True)
class ConversionReport:
    """One entry per attention and feed-forward layer that was looked at. `print(report)` shows them all.

    not_found  kinds of layer that a k was given for and of which the model has none that is known
    """

    model_class: str
    entries: tuple[ReportEntry, ...]
    not_found: tuple[str, ...] = ()

    @property
    def replaced(self) -> tuple[ReportEntry, ...]:
        return tuple(entry for entry in self.entries if entry.replaced)

    @property
    def skipped(self) -> tuple[ReportEntry, ...]:
        return tuple(entry for entry in self.entries if not entry.replaced)

    def __str__(self) -> str:
        counts = Counter((entry.kind.replace("_", "-"), entry.replaced) for entry in self.entries)
        summary = ", ".join(
            f"{number} {kind} layers {'replaced' if replaced else 'skipped'}"
            for (kind, replaced), number in counts.items()
        )
        summary = ", ".join([summary, *(f"no {kind} layer of a known kind found" for kind in self.not_found)])
        width = max((len(entry.path) for entry in self.entries), default=0)
        lines = [f"{self.model_class}: {summary}"]
        for entry in self.entries:
            action = "replaced" if entry.replaced else "skipped"
            lines.append(f"  {entry.path:<{width}}  {action:<8}  {entry.reason}")
        return "\n".join(lines)
