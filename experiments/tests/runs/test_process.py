import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support_folder import SUPPORT
from topk_experiments.runs.process import WorkerError, run_in_fresh_process


@pytest.fixture(autouse=True)
def _functions_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", SUPPORT)


def test_a_function_runs_in_a_process_of_its_own_and_returns_its_result():
    messages = []
    result = run_in_fresh_process("worker_functions:add", {"numbers": [1, 2, 3]}, on_message=messages.append)
    assert result["sum"] == 6
    assert result["pid"] != os.getpid()
    assert messages == [{"number": 1}, {"number": 2}, {"number": 3}]


@pytest.mark.parametrize(
    ("function", "outcome", "words"),
    [
        ("refuse", "error", r"^k must be at least 1, got 0$"),
        ("break_down", "crash", "the process ended with status 1\n(.*\n)*KeyError: 'our own mistake'"),
        ("be_killed", "out of memory", r"signal 9\), most likely for lack of memory"),
        ("ask_for_too_much", "out of memory", "allocate memory"),
    ],
)
def test_a_function_that_does_not_return_says_why(function, outcome, words):
    with pytest.raises(WorkerError, match=words) as caught:
        run_in_fresh_process(f"worker_functions:{function}", {})
    assert caught.value.outcome == outcome


@pytest.mark.parametrize(("chosen", "expected"), [(None, "1000"), ("77", "77")])
def test_threads_of_a_fresh_process_spin_briefly_unless_the_user_chose(monkeypatch, chosen, expected):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", chosen)
    assert run_in_fresh_process("worker_functions:add", {"numbers": []})["spin_count"] == expected


def test_a_function_that_takes_too_long_is_ended(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(WorkerError, match=r"not finished after 4 s") as caught:
        run_in_fresh_process("worker_functions:sleep", {"pid_file": str(pid_file)}, time_limit_s=4)
    assert caught.value.outcome == "time limit"
    if pid_file.exists():
        assert not is_alive(int(pid_file.read_text()))


def test_a_process_whose_parent_is_gone_ends_itself(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "from topk_experiments.runs.process import run_in_fresh_process\n"
        f"run_in_fresh_process('worker_functions:sleep', {{'pid_file': {str(pid_file)!r}}})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    finally:
        parent.kill()
        parent.wait()
    child = int(pid_file.read_text())
    wait_until(lambda: not is_alive(child))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:  # a zombie has ended, but nobody has asked for its status yet
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return status.parents[1].exists() is False
