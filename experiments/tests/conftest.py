"""Fixtures that tests of all experiments share."""

import pytest
from rich.console import Console


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
