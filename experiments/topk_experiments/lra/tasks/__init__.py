"""The tasks of the Long Range Arena (Tay et al. 2021, arXiv 2011.04006): data from generators and from files.

Every task is a frozen dataclass of its settings. `prepare` makes its data once and writes compact files, which later
calls read.
"""

from .examples import SPLITS, Batch, Examples, ExamplesWriter
from .images import GreyImages
from .listops import ListOps
from .pathfinder import Pathfinder
from .preparation import PreparedData, Task, prepare
from .retrieval import CitedPapers, SameDocument
from .text import ReviewSentiment

__all__ = [
    "SPLITS",
    "Batch",
    "CitedPapers",
    "Examples",
    "ExamplesWriter",
    "GreyImages",
    "ListOps",
    "Pathfinder",
    "PreparedData",
    "ReviewSentiment",
    "SameDocument",
    "Task",
    "prepare",
]
