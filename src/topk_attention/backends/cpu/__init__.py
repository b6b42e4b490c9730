"""Compiled kernels for CPU tensors (csrc/): scores and selection in one pass, a backward pass over kept keys alone."""

from .library import SCREENING, cpu_target, cpu_targets, forced_cpu_target, problem

__all__ = ["SCREENING", "cpu_target", "cpu_targets", "forced_cpu_target", "problem"]

if problem() is None:
    from .attention import (
        attention,
        completed_backward,
        completed_forward,
        index_inputs,
        padded_entries,
        send_rest,
        sum_intervals,
    )
    from .feed_forward import choose_neurons, feed_forward, feed_forward_backward_op, sum_neurons

    __all__ += [
        "attention",
        "choose_neurons",
        "completed_backward",
        "completed_forward",
        "feed_forward",
        "feed_forward_backward_op",
        "index_inputs",
        "padded_entries",
        "send_rest",
        "sum_intervals",
        "sum_neurons",
    ]
