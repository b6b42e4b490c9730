"""Time and memory of the feed-forward operation, tensors in, output and gradients out, against its rivals.

works.py    what is computed, the goals, and the paper's numbers
methods.py  who computes it
plans.py    who computes what
check.py    whether the answer is right
measure.py  time and memory, in processes of their own
subject.py  all of it for `kernel_benchmark`, and what its report says
"""

from .plans import make_plan
from .subject import SUBJECT

__all__ = ["SUBJECT", "make_plan"]
