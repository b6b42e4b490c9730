"""Checks many models in one process, which imports transformers once."""

from __future__ import annotations

import faulthandler
import signal
import time
from types import FrameType

import torch
import transformers

from ..runs.memory import limit_memory_to, ran_out_of_memory, resident_mib
from ..runs.process import Send
from ..runs.records import Json
from .catalogue import Model
from .check import check_model

# A model that does not come back from C++ to be stopped ends the process after so many times its limit.
_PATIENCE = 1.5


class _OverTimeError(BaseException):
    """A model takes too long. No `except Exception` of a family may catch it."""


def check_models(request: Json, send: Send) -> Json:
    """Check models, and send for each {"begun": its number} and then {"number": ..., "record": ...}.

    request  models: a type and a class for each; time_limit_s of each; memory_limit_gib of the process
    """
    torch.set_num_threads(1)
    limit_s, limit_gib = request["time_limit_s"], request["memory_limit_gib"]
    if limit_gib is not None:
        limit_memory_to(1024 * limit_gib)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _stop)
    for number, model in enumerate(request["models"]):
        send({"begun": number})
        faulthandler.dump_traceback_later(_PATIENCE * limit_s, exit=True)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        start = time.process_time()
        try:
            record = {"outcome": "finished"} | check_model(Model(*model))
        except _OverTimeError:
            record = {"outcome": "time limit", "message": f"not finished after {limit_s:g} s"}
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            record = {"outcome": "out of memory", "message": str(error)}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        seconds = round(time.process_time() - start, 1)
        send({"number": number, "record": record | {"cpu_s": seconds, "resident_mib": round(resident_mib())}})
    return {}


def _stop(_: int, __: FrameType | None) -> None:
    raise _OverTimeError
