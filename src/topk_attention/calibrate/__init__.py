"""Finds how large k must be, per layer and head, on a user's own text, and fits what is added for what is left out."""

from .allocation import LossIncrease, LostMass, MeanK
from .calibration import AnyCompletion, Calibration, calibrate, completion_by_name, fit_completion
from .stand_ins import DEFAULT_RANK, StandIns, fit_stand_ins

__all__ = [
    "DEFAULT_RANK",
    "AnyCompletion",
    "Calibration",
    "LossIncrease",
    "LostMass",
    "MeanK",
    "StandIns",
    "calibrate",
    "completion_by_name",
    "fit_completion",
    "fit_stand_ins",
]
