import time

import pytest

from topk_experiments.runs import timing
from topk_experiments.runs.timing import Stopwatch, busy_note


def test_time_is_that_of_the_block():
    with Stopwatch() as stopwatch:
        time.sleep(0.15)
    assert 0.15 <= stopwatch.elapsed_s < 1.5


def test_what_others_do_meanwhile_is_counted_in_cores(monkeypatch):
    seconds = iter([10.0, 10.4])
    monkeypatch.setattr(timing, "_cpu_seconds_of_others", lambda: next(seconds))
    with Stopwatch() as stopwatch:
        time.sleep(0.2)
    assert stopwatch.other_cores == pytest.approx(2.0, rel=0.5)


def test_a_time_too_short_to_tell_what_others_did_says_nothing_about_them():
    with Stopwatch() as stopwatch:
        pass
    assert stopwatch.other_cores is None


def test_times_taken_beside_busy_processes_carry_a_note():
    assert busy_note([None, 0.1], 2) is None
    assert busy_note([], 2) is None
    note = "Other processes kept up to 1.3 of 2 cores busy meanwhile: on a quiet machine these times are shorter."
    assert busy_note([0.1, None, 1.3], 2) == note
