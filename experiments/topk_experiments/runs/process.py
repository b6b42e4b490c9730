"""Run a function in a fresh process, so that its memory and its time are its own.

Parent and child talk over two pipes. The child's standard input carries the request and stays open. When it closes,
the parent has ended, and the child ends itself. The child's standard output carries one JSON message a line. Anything
else that the function prints goes to standard error, which is kept to explain a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from .memory import ran_out_of_memory
from .records import Json

Send = Callable[[Json], None]

# Threads of OpenMP spin before they sleep. By default they spin for so long that one other busy process on two cores
# made a forward pass of the demo (1,024 tokens, k = 64) take 43 s. With this many rounds it takes 7 s, and on a quiet
# machine single operations are as fast as before. A value that the user has set is kept.
_THREADS_SPIN_BRIEFLY = {"GOMP_SPINCOUNT": "1000"}
# glibc keeps freed blocks of up to 32 MiB for itself, with holes between them that the next tensor may not fit into.
# Because of that the demo's peak (SmolLM2, 4,096 tokens) was anything from 201 to 352 MiB above the model, for every
# kind of attention. With this setting, blocks of 1 MiB and more come from the system and go back to it: the peak is
# 113 MiB, for full attention and for top-k. Huge pages keep the cost low: 2 s of page faults in 22 s, as before; 5 s
# without them.
_FREED_MEMORY_GOES_BACK = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576:glibc.malloc.hugetlb=1"}


class WorkerError(RuntimeError):
    """A function in a fresh process that did not return.

    outcome  "out of memory", "time limit", "error" or "crash"
    """

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def run_in_fresh_process(
    function: str,
    request: Json,
    *,
    time_limit_s: float | None = None,
    on_message: Send | None = None,
    memory_in_use: bool = False,
) -> Json:
    """Call `function(request, send)` in a new Python process and return the dictionary that it returns.

    function       "package.module:name"
    time_limit_s   seconds after which the process is ended; None: no limit
    on_message     receives each dictionary that the function sends while it runs
    memory_in_use  the process returns freed memory to the system at once, so that its resident memory is what it uses.
                   This works where the C library is glibc and the user has not set GLIBC_TUNABLES

    Raises:
        WorkerError: the function raised, ran out of memory or of time, or its process died.

    >>> run_in_fresh_process("topk_experiments.runs.process:echo", {"k": 3})
    {'k': 3}
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            # -P: a file called json.py in the current folder stays out.
            [sys.executable, "-P", "-m", __name__, function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_THREADS_SPIN_BRIEFLY | (_FREED_MEMORY_GOES_BACK if memory_in_use else {}) | os.environ,
            text=True,
            encoding="utf-8",
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(time_limit_s, stop) if time_limit_s is not None else None
        if timer is not None:
            timer.start()
        try:
            last = _converse(process, request, on_message)
            process.wait()
        finally:
            if timer is not None:
                timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
        if "result" in last:
            return last["result"]
        if "error" in last:
            raise WorkerError(last["outcome"], last["error"])
        if timed_out.is_set():
            raise WorkerError("time limit", f"not finished after {time_limit_s:g} s")
        errors.seek(0)
        raise _crash(process.returncode, errors.read())


@contextlib.contextmanager
def failures_named(name: str) -> Iterator[None]:
    """Put the name of a run in front of the message of a `WorkerError`."""
    try:
        yield
    except WorkerError as error:
        raise WorkerError(error.outcome, f"{name} failed ({error.outcome}): {error}") from error


def echo(request: Json, send: Send) -> Json:
    """Return the request; to try a fresh process out."""
    return request


def _converse(process: subprocess.Popen[str], request: Json, on_message: Send | None) -> Json:
    """Send the request, pass messages on, and return the last one: a result, an error, or nothing."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return {}
    for line in process.stdout:
        message = json.loads(line)
        if "result" in message or "error" in message:
            return message
        if on_message is not None:
            on_message(message)
    return {}


def _crash(return_code: int, errors: str) -> WorkerError:
    if -return_code == getattr(signal, "SIGKILL", None):
        return WorkerError("out of memory", "the system ended the process (signal 9), most likely for lack of memory")
    last_lines = [line for line in errors.splitlines() if line.strip(" ^~")][-5:]
    if "bad_alloc" in errors or "allocate memory" in errors:
        return WorkerError("out of memory", "\n".join(last_lines[-1:]))
    return WorkerError("crash", "\n".join([f"the process ended with status {return_code}", *last_lines]))


def _close(pipe: IO[str]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the child ended before it had read everything
        pipe.close()


def _child(function: str) -> None:
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(message: Json) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    module_name, _, name = function.partition(":")
    try:
        answer: Json = {"result": getattr(importlib.import_module(module_name), name)(request, send)}
    except (MemoryError, RuntimeError, ValueError, OSError) as error:
        text = str(error).strip() or type(error).__name__
        if ran_out_of_memory(error):
            answer = {"error": text, "outcome": "out of memory"}
        elif isinstance(error, ValueError | OSError):  # a wrong argument, or a failed check
            answer = {"error": text, "outcome": "error"}
        else:
            raise
    send(answer)
    # Skip the shutdown of the interpreter: the system frees the memory of this process faster.
    messages.close()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _main(arguments: list[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which then closes the pipe
    _child(*arguments)


if __name__ == "__main__":
    _main(sys.argv[1:])
