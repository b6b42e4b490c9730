import json
from dataclasses import asdict, replace

import pytest

from topk_experiments.benchmarks.model import Point, grid
from topk_experiments.benchmarks.model.points import METHODS, curve_name, settings


def test_the_record_of_a_point_leaves_out_what_its_method_does_not_look_at():
    assert Point("bert-base", "sdpa", 64, k=3).as_record() == Point("bert-base", "sdpa", 64, k=4).as_record()
    assert Point("bert-base", "topk", 64, k=3).as_record() != Point("bert-base", "topk", 64, k=4).as_record()
    chunks = Point("bert-base", "query-chunks", 64, feed_forward_k=256)
    assert chunks.as_record() == replace(chunks, k=1, feed_forward_k="all").as_record()
    assert chunks.as_record() != replace(chunks, feed_forward_k=None).as_record()


def test_random_features_tell_points_apart_where_there_are_any():
    for method in ("performer", "rfa"):
        one = Point("bert-base", method, 64, feed_forward_k=9, k=3)
        assert one.as_record() == replace(one, feed_forward_k=None, k=4).as_record()
        assert one.as_record() != replace(one, num_features=128).as_record()
        assert one.as_record()["feed_forward_k"] is None
    for method in ("vanilla", "sdpa", "query-chunks", "topk"):
        # As in records on file from before this number existed.
        assert "num_features" not in Point("bert-base", method, 64).as_record()


def test_no_folder_reaches_a_record(point):
    record = json.dumps(point().as_record())
    assert point().source.location not in record
    assert point().source.revision in record


def test_a_point_goes_to_another_process_and_back(point):
    for one in (point("t5", feed_forward_k="all"), Point("t5-base", "vanilla", 9)):
        assert Point.of(json.loads(json.dumps(asdict(one)))) == one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": "bert-huge"}, "shape must be among bert-base, t5-base, got 'bert-huge'; or give --config"),
        ({"method": "flash"}, "methods must be among vanilla, sdpa, query-chunks, topk, performer, rfa, got 'flash'"),
        ({"k": 0}, "k must be at least 1"),
        ({"feed_forward_k": 0}, "feed_forward_k must be at least 1"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"method": "rfa", "num_features": 7}, "num_features must be even for rfa"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"device": "tpu"}, 'device must be "cpu" or "cuda"'),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        Point(**{"shape": "bert-base", "method": "topk", "length": 64} | changes)


def test_the_backend_in_a_record_is_the_one_that_runs():
    assert Point("bert-base", "topk", 64, device="cuda").as_record()["backend"] == "chunked"
    assert Point("bert-base", "query-chunks", 64, backend="reference").as_record()["backend"] == "chunked"
    assert Point("bert-base", "vanilla", 64).as_record()["backend"] is None


def test_curves_differ_by_method_and_kept_neurons_alone():
    points = grid([64, 128], METHODS, shape="bert-base", feed_forward_k=9, k=3)
    names = [curve_name(point.as_record()) for point in points]
    assert names[:6] == names[6:]
    assert len(set(names)) == 6
    by_method = dict(zip(METHODS, names, strict=False))
    assert "k = 3" in by_method["topk"]
    assert "9 neurons" in by_method["topk"]
    assert "every neuron in token chunks" in by_method["query-chunks"]
    assert by_method["performer"] == "Performer, 256 features"
    assert by_method["rfa"] == "Random Feature Attention, 256 features"
    (shared,) = {json.dumps(settings(point.as_record())) for point in points}
    assert "dropout_p" in shared
    assert json.dumps(settings(replace(points[0], dropout_p=0.0).as_record())) != shared
