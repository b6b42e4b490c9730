"""What is compared, as records and tables name it, and when two results are alike."""

from __future__ import annotations

ATTENTION_K = 3
FEED_FORWARD_K = 6
ALL_KEYS = "all keys"
FEW_KEYS = f"k = {ATTENTION_K}"
COMPLETED = f"k = {ATTENTION_K}, completed"
ALL_NEURONS = "all neurons"
FEW_NEURONS = f"{FEED_FORWARD_K} neurons"
LOADED = "saved and loaded"
RESTORED = "restored"
OF_ATTENTION = (ALL_KEYS, FEW_KEYS, COMPLETED, LOADED, RESTORED)
OF_NETWORKS = (ALL_NEURONS, FEW_NEURONS)
# Of differences from the truth, as a share of the largest number of the tensor.
_ROUNDING = 5e-5
_ROUNDING_OF_GRADIENTS = 1e-3


def is_rounding(exercise: str, value: float | str) -> bool:
    """Whether a difference in an exercise is rounding and no more."""
    if isinstance(value, str):
        return False
    return value <= (_ROUNDING_OF_GRADIENTS if exercise.startswith("gradients") else _ROUNDING)
