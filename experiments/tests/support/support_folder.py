"""Where fresh processes of a test find `worker_functions`."""

from pathlib import Path

SUPPORT = str(Path(__file__).parent)
