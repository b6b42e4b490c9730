"""Data and metrics: what a model reads and how its answers are scored. Nothing here trains."""
