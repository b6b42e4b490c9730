import pytest

from topk_experiments.benchmarks.error import ErrorBenchmark


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["linformer"]}, "methods must be among topk, topk-completed, .*, got 'linformer'"),
        ({"methods": []}, "there is nothing to measure: give at least one length and one method"),
        ({"lengths": []}, "there is nothing to measure"),
        ({"lengths": [1]}, "lengths must be at least 2, got 1"),
        ({"k": [0]}, "k must be at least 1"),
        ({"features": [32, 33]}, "features must be even"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"layers": [-1]}, r"layers must be numbers from 0, got \[-1\]"),
        ({"device": "tpu"}, 'device must be "cpu" or "cuda", got \'tpu\''),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ErrorBenchmark(**options)


def test_layers_that_the_model_has_not_are_refused():
    assert ErrorBenchmark(layers=[3, 1, 3]).layers_of(4) == [1, 3]
    with pytest.raises(ValueError, match="layers must be below 3, the model's number of them, got 3"):
        ErrorBenchmark(layers=[3]).layers_of(3)


def test_few_layers_are_all_looked_at():
    assert ErrorBenchmark().layers_of(2) == [0, 1]


def test_every_method_is_measured_at_all_of_its_sizes():
    benchmark = ErrorBenchmark(methods=["topk", "rfa", "sdpa"], k=[4, 8], features=[16])
    points = benchmark.points(64, ("model", "1"), ("text", "2"), [0])
    assert [(point.method, point.size) for point in points] == [("topk", 4), ("topk", 8), ("rfa", 16), ("sdpa", None)]


def test_points_of_exact_methods_do_not_depend_on_the_number_of_draws():
    def records(method, draws):
        benchmark = ErrorBenchmark(methods=[method], k=[4], features=[16], draws=draws)
        return [point.as_record() for point in benchmark.points(64, ("model", "1"), ("text", "2"), [0])]

    assert records("topk", 1) == records("topk", 2)
    assert records("rfa", 1) != records("rfa", 2)
