from dataclasses import asdict

import pytest

from topk_experiments.benchmarks.model import measure
from topk_experiments.benchmarks.model.measure import measure_step


@pytest.fixture
def measured(monkeypatch):
    """Measures in this process, which keeps its memory limit."""
    limits = []
    monkeypatch.setattr(measure, "limit_memory_on", lambda device, mib: limits.append(mib))

    def run(point, repetitions=2, enough_s=60.0):
        request = {
            "point": asdict(point),
            "repetitions": repetitions,
            "enough_s": enough_s,
            "memory_limit_mib": 1234.0,
        }
        messages = []
        result = measure_step(request, messages.append)
        assert limits == [1234.0]
        return result, [message["doing"] for message in messages]

    return run


def test_a_point_reports_its_check_its_steps_and_its_memory(measured, point):
    result, messages = measured(point("t5", checkpointing=True))
    assert messages == ["checking the answer", "step 1", "step 2"]
    assert result["repetitions"] == len(result["losses"]) == 2
    assert result["fastest_s"] <= result["elapsed_s"] <= result["slowest_s"]
    assert 0 < result["forward_s"] < result["slowest_s"]
    assert result["check"]["loss_error"] < 1e-4
    assert result["peak_mib"] >= result["peak_of_forward_mib"] >= 0
    assert result["weights_mib"] == pytest.approx(4 * result["num_parameters"] / 2**20)


def test_weights_and_their_gradients_count(measured, tmp_path):
    from convert_models import tiny_bert
    from topk_experiments.benchmarks.model import Point
    from topk_experiments.models.pretrained import find_model

    folder = tmp_path / "wide"
    config = tiny_bert().config
    config.vocab_size = 2**18  # words of 32 numbers: 32 MiB, and their gradients
    config.save_pretrained(folder)
    result, _ = measured(Point("wide", "sdpa", 40, source=find_model(str(folder))), repetitions=1)
    assert result["weights_mib"] > 32
    assert 64 < result["peak_mib"] < 112
    assert 32 < result["peak_of_forward_mib"] < 64


def test_steps_that_take_long_are_fewer(measured, point):
    result, _ = measured(point(), repetitions=5, enough_s=0.0)
    assert result["repetitions"] == 1
