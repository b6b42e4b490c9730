"""Finds how large k must be, per layer and head, on a user's own text."""

from .allocation import LossIncrease, LostMass, MeanK
from .calibration import Calibration, calibrate, fit_completion

__all__ = ["Calibration", "LossIncrease", "LostMass", "MeanK", "calibrate", "fit_completion"]
