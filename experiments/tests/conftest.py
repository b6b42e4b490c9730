"""Fixtures that tests of all experiments share."""

import importlib
import json

import pytest
from rich.console import Console

from topk_experiments.runs import steps


@pytest.fixture
def one_fresh_process(monkeypatch):
    """`one_fresh_process(module)`: each kind of worker has a process of its own once, and runs here from then on.

    The start of a process takes seconds.
    """

    def limit(module):
        in_fresh_process, seen = module.run_in_fresh_process, set()

        def run(function, request, **options):
            if function not in seen:
                seen.add(function)
                return in_fresh_process(function, request, **options)
            name, _, worker = function.partition(":")
            send = options.get("on_message") or (lambda message: None)
            result = getattr(importlib.import_module(name), worker)(json.loads(json.dumps(request)), send)
            return json.loads(json.dumps(result))

        monkeypatch.setattr(module, "run_in_fresh_process", run)
        monkeypatch.setattr(steps, "limit_memory", lambda *limits: None)  # it would outlive the test

    return limit


@pytest.fixture
def unpainted_pictures(monkeypatch):
    """Pictures are composed, but files hold no more than the first bytes of one: painting them takes a second each.

    For tests of the words beside pictures. Other tests paint those of every report.
    """
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"\x89PNG"))


@pytest.fixture
def console():
    return Console(width=140, record=True)
