import pytest

from topk_experiments.runs import steps


class Measurements:
    """Stands in for fresh processes; counts them.

    seconds  method -> of its forward pass; with the backward pass it takes twice as long
    errors   function -> what it raises
    more_memory  fields that are recorded besides the peak
    """

    def __init__(self):
        self.requests, self.seconds, self.errors, self.failed = [], {}, {}, {}
        self.more_memory = {}

    def __call__(self, function, request, **options):
        function = function.partition(":")[2]
        self.requests.append((function, request))
        if function in self.errors:
            raise self.errors[function]
        if function == "measure_memory":
            peak_mib = 12.0 if request["method"].startswith("topk") else 10.0
            return {"peak_mib": peak_mib, "baseline_mib": 100.0, "total_peak_mib": 100.0 + peak_mib} | self.more_memory
        times = {method: self._times(method, request["work"].get("length", 64)) for method in request["methods"]}
        return {"methods": times, "floor": _summary(0.5), "rounds": 3, "other_cores": 0.0}

    def _times(self, method, length):
        if method in self.failed:
            return {"outcome": "out of memory", "message": "cannot allocate memory"}
        seconds = self.seconds.get(method, 1.0) * (length / 64) ** 2
        return {"outcome": "finished", "forward": _summary(seconds), "forward_backward": _summary(2 * seconds)}


def _summary(seconds):
    return {"median_s": seconds, "fastest_s": 0.9 * seconds, "slowest_s": 1.2 * seconds}


@pytest.fixture
def measurements(monkeypatch):
    stand_in = Measurements()
    monkeypatch.setattr(steps, "run_in_fresh_process", stand_in)
    return stand_in
