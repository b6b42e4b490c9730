"""Finds how large k must be, per layer and head, on a user's own text."""

from .allocation import LossIncrease, LostMass, MeanK
from .calibration import AnyCompletion, Calibration, calibrate, completion_by_name, fit_completion

__all__ = [
    "AnyCompletion",
    "Calibration",
    "LossIncrease",
    "LostMass",
    "MeanK",
    "calibrate",
    "completion_by_name",
    "fit_completion",
]
