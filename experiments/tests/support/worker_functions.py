"""Functions that the tests run in a fresh process."""

import os
import signal
import time
from pathlib import Path

import torch

from topk_experiments.runs.memory import PeakMeter, limit_memory
from topk_experiments.runs.steps import start_point


def add(request, send):
    print("on standard output, out of the messages' way")
    for number in request["numbers"]:
        send({"number": number})
    return {"sum": sum(request["numbers"]), "pid": os.getpid(), "spin_count": os.environ.get("GOMP_SPINCOUNT")}


def refuse(request, send):
    raise ValueError("k must be at least 1, got 0")


def break_down(request, send):
    raise KeyError("our own mistake")


def be_killed(request, send):
    os.kill(os.getpid(), signal.SIGKILL)


def ask_for_too_much(request, send):
    limit_memory(0.9)
    return {"size": len(torch.ones(2**44))}


def sleep(request, send):
    Path(request["pid_file"]).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def ask_for_three_gib(request, send):
    start_point(request)
    return {"bytes": torch.empty(3 * 2**30, dtype=torch.uint8).nbytes}  # reserved, never touched


def leave_holes(request, send):
    torch.ones(6 * 2**20)  # 24 MiB, freed at once: glibc keeps blocks of up to that size from now on
    with PeakMeter() as meter:
        blocks, between = [], []
        for _ in range(16):
            blocks.append(torch.ones(2**20))
            between.append(bytearray(600_000))  # too large for the holes that imports leave
        blocks.clear()
        held_mib = meter.held_mib()
    return {"held_mib": held_mib, "method": meter.read().method}
