"""Fixtures that tests of all experiments share."""

import pytest
from rich.console import Console


@pytest.fixture
def console():
    return Console(width=140, record=True)
