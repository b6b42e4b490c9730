"""What a conversion did to each layer, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..functional import Completion, StandIn
from .settings import K


@dataclass(frozen=True)
class ReportEntry:
    """What `convert` did to one layer.

    path        the layer's name, as in model.named_modules()
    kind        "attention" or "feed_forward"
    k           what the layer uses now; None where it was skipped
    reason      why it was skipped, or the k in words
    completion  what an attention layer adds for the keys that are not kept; None where it adds nothing
    stand_in    what a feed-forward layer adds for the neurons that are not kept; None where it adds nothing
    """

    path: str
    kind: Literal["attention", "feed_forward"]
    k: K | None
    reason: str
    completion: Completion | None = None
    stand_in: StandIn | None = None

    @property
    def replaced(self) -> bool:
        return self.k is not None


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did: one entry per attention and feed-forward layer. `print(report)` shows them all.

    model_class  name of the model's class
    entries      one for each layer that was examined
    not_found    kinds of layer that a k was given for, and of which no known layer was found
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
