"""Memory and time of attention, three times: the operation alone, one layer against its length, and chunk sizes.

The settings are those of the figures of Gupta et al. 2021: batch 1, 12 heads of 64, float32. The operation alone
alternates with its rivals in one process.
"""

from .captions import CHUNKS, LAYERS, ROUNDS

__all__ = ["CHUNKS", "LAYERS", "ROUNDS"]
