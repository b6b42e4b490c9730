"""Memory and time of a feed-forward layer, twice: beside its rivals in turns, and against its number of neurons.

The settings are those of the figure of Gupta et al. 2021: d_model 768, ReLU, k = 512; of its 262,144 tokens there are
fewer.
"""

from .captions import LAYERS, ROUNDS

__all__ = ["LAYERS", "ROUNDS"]
