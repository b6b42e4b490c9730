"""Models that experiments use, their input and their scores. Nothing in this package trains."""
