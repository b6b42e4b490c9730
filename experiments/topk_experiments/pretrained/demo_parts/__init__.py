"""The demo in four parts, each in a process of its own: what top-k attention gives, what it costs, and where it fails.

reading.py     a model answers from a long document, in full and with top-k side by side
operations.py  the operations against PyTorch's best forms
quality.py     perplexity with one k for all heads, with calibrated k, and completed, against full attention
training.py    steps of fine-tuning a cut of the model with dropout
run.py         which parts are missing on file
report.py      sentences, table, picture and page from the record
"""

from .run import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
