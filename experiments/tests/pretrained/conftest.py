import importlib
import json

import pytest

from model_fixtures import text_file, tiny_encoder, tiny_model  # noqa: F401 - fixtures
from topk_experiments.pretrained import passkey
from topk_experiments.pretrained.demo_parts import run


@pytest.fixture
def in_this_process(monkeypatch):
    """Functions that otherwise have a fresh process run here, which saves its start of several seconds."""

    def run_here(function, request, *, on_message, **_):
        module, _, name = function.partition(":")
        request = json.loads(json.dumps(request))
        return json.loads(json.dumps(getattr(importlib.import_module(module), name)(request, on_message)))

    for module in (run, passkey):
        monkeypatch.setattr(module, "run_in_fresh_process", run_here)
