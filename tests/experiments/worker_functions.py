"""Functions that the tests run in a fresh process."""

import os
import signal
import time
from pathlib import Path

import torch

from topk_attention.experiments.memory import limit_memory
from topk_attention.experiments.points import start_point


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
